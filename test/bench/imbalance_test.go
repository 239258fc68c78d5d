package bench

import (
	"math/rand/v2"
	"net"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// BenchmarkImbalance is how many of 1000 TCP connections that stay open the busiest
// of four listeners has, and the idlest: when all have come; after each of them
// was replaced four times, at random; and when one listener was closed, another one
// came in its place, and half of all connections were replaced.
func BenchmarkImbalance(b *testing.B) {
	for _, policy := range []loader.Policy{loader.PolicyHash, loader.PolicyRR, loader.PolicyLeast} {
		b.Run(policy.String(), func(b *testing.B) {
			for b.Loop() {
				keepAlive(b, policy)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

func keepAlive(b *testing.B, policy loader.Policy) {
	const connections = 1000
	ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
	servers := testnet.StartGroup(b, ns, 4, testnet.ServerOptions{Network: "tcp4", Addr: "127.0.0.1:8080", ReusePort: true})
	attachWith(b, fs, ns, loader.Options{Policy: policy})

	random := rand.New(rand.NewPCG(1, 2)) // the same each time, but for the ports
	open := make([]held, connections)
	defer func() {
		for _, c := range open {
			c.close()
		}
	}()
	replace := func(times int) {
		must(b, ns.Do(func() error {
			for range times {
				c := &open[random.IntN(connections)]
				c.close()
				if err := c.dial(); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	busiestAndIdlest := func(when string, names ...string) {
		has := map[string]int{}
		for _, c := range open {
			has[c.server]++
		}
		busiest, idlest := 0, connections
		for _, name := range names {
			busiest, idlest = max(busiest, has[name]), min(idlest, has[name])
		}
		b.ReportMetric(float64(busiest), "busiest-"+when)
		b.ReportMetric(float64(idlest), "idlest-"+when)
	}

	must(b, ns.Do(func() error {
		for i := range open {
			if err := open[i].dial(); err != nil {
				return err
			}
		}
		return nil
	}))
	busiestAndIdlest("arrived", servers.Names...)
	replace(4 * connections)
	busiestAndIdlest("churned", servers.Names...)

	// What the closed one has accepted it keeps.
	left := servers.Names[0]
	servers.Close(0)
	joined := servers.Add()
	attachWith(b, fs, ns, loader.Options{})
	must(b, ns.Do(func() error {
		for i := range open {
			if c := &open[i]; c.server == left {
				c.close()
				if err := c.dial(); err != nil {
					return err
				}
			}
		}
		return nil
	}))
	replace(connections / 2)
	busiestAndIdlest("restarted", append(servers.Names[1:len(servers.Names)-1:len(servers.Names)-1], joined)...)
}

// held is a connection that stays open, and which listener has it.
type held struct {
	net.Conn
	server string
}

func (c *held) dial() (err error) {
	if c.Conn, err = net.Dial("tcp4", "127.0.0.1:8080"); err != nil {
		return err
	}
	name := make([]byte, 16)
	n, err := c.Read(name)
	c.server = string(name[:n])
	return err
}

// close resets the connection: it leaves no TIME_WAIT on its port.
func (c *held) close() {
	if c.Conn != nil {
		c.Conn.(*net.TCPConn).SetLinger(0)
		c.Conn.Close()
	}
}
