package maps

import (
	"sync/atomic"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/bpf"
)

// ABI is the version of the pinned layout, RPSEL_ABI in bpf/rpsel.h.
const ABI = 2

// Policies, affinities and the like, as in bpf/rpsel.h.
const (
	PolicyHash     = 0 // by the pick table
	PolicyNewest   = 1 // by the pick table, which names the newest generation only
	PolicyLeast    = 2 // of two candidates the one with fewer flows for its weight
	PolicyRR       = 3 // each in turn
	PolicyRandom   = 4 // drawn for each flow
	PolicyCPU      = 5 // one that ran on the CPU
	AffinityFlow   = 0 // client address and port, and local address
	AffinityNone   = 1 // every packet is picked anew
	AffinityClient = 2 // client address, or a prefix of it
	AffinityBytes  = 3 // bytes of the payload
	ConfirmClient  = 0 // by the client's next packet
	FirstAny       = 0 // a flow's first packet says nothing of where it belongs
	FirstOpenVPN   = 1 // one of OpenVPN may
	ConfirmReply   = 1 // by the server's answer
)

// KeyBytes is how many bytes of a payload can be an identity (KEY_BYTES in
// bpf/rpsel.h).
const KeyBytes = 20

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

// Owner returns the user whose processes may register through the agent. It
// reports false if there is none.
func (c *Config) Owner() (uid uint32, ok bool) {
	v := c.Values()
	return atomic.LoadUint32(&v.Owner), atomic.LoadUint32(&v.HasOwner) != 0
}

// SetOwner changes the owner.
func (c *Config) SetOwner(uid uint32, ok bool) {
	v := c.Values()
	atomic.StoreUint32(&v.HasOwner, 0)
	atomic.StoreUint32(&v.Owner, 0)
	if ok {
		atomic.StoreUint32(&v.Owner, uid)
		atomic.StoreUint32(&v.HasOwner, 1)
	}
}

// Waiting is what a group waits for (enum waiting in bpf/rpsel.h).
type Waiting uint32

// What a group may wait for.
const (
	NotWaiting Waiting = iota
	Settling           // flows from before the attach are to be seen first
	Turning            // the next generation is not complete
)

// Waiting returns what the group waits for, and for how many more seconds.
func (c *Config) Waiting(now uint32) (what Waiting, left uint32) {
	v := c.Values()
	what = Waiting(atomic.LoadUint32(&v.Waiting))
	left = uint32(max(0, Age(atomic.LoadUint32(&v.Until), now)))
	if what == NotWaiting || left == 0 {
		return NotWaiting, 0
	}
	return what, left
}

// Wait makes the group wait until the given second, or ends it at once if that
// is not in the future. A group that waits does so without a break.
func (c *Config) Wait(what Waiting, now, until uint32) {
	v := c.Values()
	if before, _ := c.Waiting(now); before == NotWaiting || Age(until, now) <= 0 {
		atomic.StoreUint32(&v.Waiting, uint32(NotWaiting))
	}
	atomic.StoreUint32(&v.Until, until&secondMask)
	if Age(until, now) > 0 {
		atomic.StoreUint32(&v.Waiting, uint32(what))
	}
}

// Frozen reports whether the flow table is being copied, so that nothing may be
// written to it (frozen in bpf/select.c).
func (c *Config) Frozen(now uint32) bool {
	since := atomic.LoadUint32(&c.Values().Frozen)
	lasted := Age(now, since)
	return since != 0 && lasted >= 0 && lasted < FreezeSeconds
}
