package loader_test

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// await looks at a group until it is as it should be. Between the looks nobody
// has a descriptor of its program and maps.
func await(t *testing.T, fs loader.FS, key loader.Key, what string, done func(*loader.Group) bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		g, err := fs.Open(key)
		if err != nil {
			t.Fatal(err)
		}
		ok := done(g)
		g.Close()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still waiting: %s", what)
		}
	}
}

func entries(t *testing.T, g *loader.Group) int {
	t.Helper()
	n, err := g.Entries()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// freed waits until the kernel has let go of a program.
func freed(t *testing.T, id uint32) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
		if errors.Is(err, os.ErrNotExist) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		p.Close()
	}
	t.Errorf("program %d is still there", id)
}

func needTimer(t *testing.T) {
	t.Helper()
	testnet.Privileged(t)
	if !loader.HaveTimer() {
		(&testnet.Unavailable{What: "bpf_timer", Err: errors.ErrUnsupported}).Skip(t)
	}
}

// With no process of rpsel alive the program keeps house: expired flows leave the
// table, and a dead listener leaves the pick table also where no flow falls on it; one
// that drains has none in the end. The control is the program as for a kernel that has no timer.
func TestHouse(t *testing.T) {
	needTimer(t)
	for _, c := range []struct {
		name    string
		timer   bool
		servers testnet.ServerOptions
		remote  string
	}{
		{"no timer", false, udpServer, fleetAddr},
		{"timer", true, udpServer, fleetAddr},
		{"timer, IPv6", true, testnet.ServerOptions{Network: "udp6", Addr: "[::]:1194", ReusePort: true}, "[::1]:1194"},
	} {
		t.Run(c.name, func(t *testing.T) {
			timer, restore := c.timer, func() {}
			if !timer {
				restore = loader.NoTimer()
			}
			ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
			servers := testnet.StartGroup(t, ns, 4, c.servers)
			g := attach(t, fs, ns, loader.Options{Flows: 1000, Settle: -1, IdleNew: time.Hour})
			restore()
			t.Parallel()
			key := g.Key()
			id, err := g.ProgramID()
			if err != nil {
				t.Fatal(err)
			}
			g.Close()

			clients := testnet.NewClients(t, ns, 300, c.remote)
			before := clients.Ask()
			await(t, fs, key, "a listener drains", func(g *loader.Group) bool { return g.Drain(0) == nil })
			servers.Close(1)
			after := clients.Ask()
			if moved := testnet.Moved(before, after, "s1"); moved != 0 {
				t.Errorf("%d flows of others moved", moved)
			}
			tracked := 0
			await(t, fs, key, "flows expire", func(g *loader.Group) bool {
				g.ExpireAfter(1, 1)
				if tracked, _, err = g.CountFlows(); err != nil {
					t.Fatal(err)
				}
				return tracked == 0
			})
			if !timer {
				await(t, fs, key, "the time of three ticks passes", passed(t, 3))
			}
			gone := func(g *loader.Group) bool { return entries(t, g) == 0 && g.Picked(1) == 0 }
			if timer {
				await(t, fs, key, "expired flows and a dead listener leave the tables", gone)
			}
			await(t, fs, key, "control", func(g *loader.Group) bool {
				if n, picked := entries(t, g), g.Picked(1); !timer && (n == 0 || picked == 0) {
					t.Errorf("control: %d entries, %d of the pick table", n, picked)
				}
				// Whether they are out of the table or not, nobody is shown expired flows.
				for f, err := range g.Flows() {
					t.Errorf("expired, and shown: %+v, %v", f, err)
				}
				if s := status(t, g); s.Tracked != 0 || s.Listeners[0].State != "draining" || s.Listeners[0].Flows != 0 {
					t.Errorf("drained: %+v", s)
				}
				if g.Live(1) || !g.Live(0) {
					t.Errorf("live: the dead %v, another %v", g.Live(1), g.Live(0))
				}
				if kept, err := g.Kept(); err != nil || kept != timer {
					t.Errorf("kept %v, %v", kept, err)
				}
				return true
			})
			shares := testnet.Shares(testnet.NewClients(t, ns, 900, c.remote).Ask())
			for _, name := range []string{"s2", "s3"} {
				if shares[name] < 300 || shares["s0"] != 0 {
					t.Errorf("new flows: %v", shares)
				}
			}
			if _, err := fs.Detach(key); err != nil {
				t.Fatal(err)
			}
			freed(t, id)
		})
	}
}

// passed returns a condition that is met once some seconds have passed on the
// program's clock.
func passed(t *testing.T, seconds uint32) func(*loader.Group) bool {
	var began uint32
	return func(g *loader.Group) bool {
		now, err := g.Now()
		if err != nil {
			t.Fatal(err)
		}
		if began == 0 {
			began = now
		}
		return now-began > seconds
	}
}

// The program that an upgrade puts in place keeps house from the first packet on
// that it refreshes, and the one before goes.
func TestHouseUpgrade(t *testing.T) {
	needTimer(t)
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 4, udpServer)
	g := attach(t, fs, ns, loader.Options{Flows: 1000, Settle: -1, IdleNew: 3 * time.Second, Idle: 3 * time.Second})
	key := g.Key()
	id, err := g.ProgramID()
	if err != nil {
		t.Fatal(err)
	}
	g.Close()
	talking := testnet.NewClients(t, ns, 10, fleetAddr)
	before := talking.Ask()
	testnet.NewClients(t, ns, 300, fleetAddr).Ask()

	restore := loader.OtherProgram()
	u, err := fs.Upgrade(key, loader.UpgradeOptions{})
	restore()
	if err != nil || u.UpToDate || !u.Program || len(u.Made) != 0 {
		t.Fatalf("upgraded %+v, %v", u, err)
	}
	t.Parallel()
	freed(t, id)
	kept := func(g *loader.Group) bool {
		kept, err := g.Kept()
		if err != nil {
			t.Fatal(err)
		}
		return kept
	}
	await(t, fs, key, "the program before has stopped", func(g *loader.Group) bool { return !kept(g) })
	await(t, fs, key, "the program keeps house, and expired flows go", func(g *loader.Group) bool {
		if moved := testnet.Moved(before, talking.Ask()); moved != 0 {
			t.Errorf("%d flows moved", moved)
		}
		return kept(g) && entries(t, g) == 10
	})
}
