package maps

import (
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// ABI is the version of the pinned layout, RPSEL_ABI in bpf/rpsel.h.
const ABI = 1

// Policies, affinities and ways of confirmation, as in bpf/rpsel.h.
const (
	PolicyHash    = 0 // by the pick table
	AffinityFlow  = 0 // client address and port, and local address
	AffinityNone  = 1 // every packet is picked anew
	ConfirmClient = 0 // by the client's next packet
)

// Config is what user space tells the selection program, and itself. Several
// processes may read it at once; only the holder of the namespace's lock writes.
type Config struct {
	mapped[bpf.SelectConfig]
}

// OpenConfig maps the configuration. The caller keeps the map and may close it.
func OpenConfig(m *ebpf.Map) (*Config, error) {
	memory, err := mapArray[bpf.SelectConfig](m)
	if err != nil {
		return nil, err
	}
	return &Config{memory}, nil
}

// Values returns the fields, each as it stands.
func (c *Config) Values() *bpf.SelectConfig { return &c.values[0] }

// Limits are the idle times in force.
func (c *Config) Limits() Limits {
	v := c.Values()
	return Limits{New: atomic.LoadUint32(&v.IdleNew), Established: atomic.LoadUint32(&v.Idle)}
}

// SetLimits changes the idle times.
func (c *Config) SetLimits(l Limits) {
	v := c.Values()
	atomic.StoreUint32(&v.IdleNew, l.New)
	atomic.StoreUint32(&v.Idle, l.Established)
}

// Settling returns how many more seconds flows that look new are left where
// the kernel had them.
func (c *Config) Settling(now uint32) uint32 {
	v := c.Values()
	if atomic.LoadUint32(&v.Settling) == 0 {
		return 0
	}
	return uint32(max(0, Age(atomic.LoadUint32(&v.Settled), now)))
}

// Settle makes the group settle until the given second, or ends it at once if
// that is not in the future.
func (c *Config) Settle(now, until uint32) {
	v := c.Values()
	atomic.StoreUint32(&v.Settling, 0)
	atomic.StoreUint32(&v.Settled, until&secondMask)
	if Age(until, now) > 0 {
		atomic.StoreUint32(&v.Settling, 1)
	}
}
