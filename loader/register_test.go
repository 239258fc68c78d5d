package loader_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// Sockets that come at the same time are registered together, each with the
// process that has it; what cannot be registered keeps nobody else from it.
func TestRegisterAll(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	options := testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true}
	testnet.StartGroup(t, ns, 2, options)
	g := attach(t, fs, ns, noSettle)
	clients := testnet.NewClients(t, ns, 1000, "127.0.0.1:1194")
	before := clients.Ask()

	options.Name = "new"
	joiners := testnet.StartGroup(t, ns, 3, options)
	elsewhere := testnet.New(t)
	testnet.StartGroup(t, elsewhere, 1, options)
	groups, err := sockets.Find(sockets.Query{NetNS: ns.Cookie(), Port: 1194})
	if err != nil || len(groups) != 1 || len(groups[0].Members) != 5 {
		t.Fatalf("found %+v, %v", groups, err)
	}
	conns := []syscall.Conn{member(t, elsewhere)}
	for _, m := range groups[0].Members {
		conn, err := m.Take()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	conns = append(conns, conns[5]) // twice the same

	answers, err := g.RegisterAll(conns)
	if err != nil {
		t.Fatal(err)
	}
	if len(answers) != len(conns) || !errors.Is(answers[0].Err, sockets.ErrOtherGroup) {
		t.Fatalf("answers %+v, want %v first", answers, sockets.ErrOtherGroup)
	}
	for i, a := range answers[1:] {
		if a.Err != nil || a.Slot != min(i, 4) {
			t.Errorf("socket %d: %+v, want slot %d", i, a, min(i, 4))
		}
	}
	for _, l := range status(t, g).Listeners[2:] {
		if l.PID != joiners.PID() || l.State != "active" {
			t.Errorf("listener %+v, want one of process %d", l, joiners.PID())
		}
	}
	if diff := cmp.Diff(before, clients.Ask()); diff != "" {
		t.Errorf("flows moved: %s", diff)
	}
	shares := testnet.Shares(testnet.NewClients(t, ns, 1000, "127.0.0.1:1194").Ask())
	for _, name := range joiners.Names {
		if shares[name] < 100 || shares[name] > 300 {
			t.Errorf("%s has %d of 1000 new flows, want a fifth: %v", name, shares[name], shares)
		}
	}

	if answers, err := g.RegisterAll(nil); err != nil || len(answers) != 0 {
		t.Errorf("nothing to register: %+v, %v", answers, err)
	}
	if _, err := fs.Detach(g.Key()); err != nil {
		t.Fatal(err)
	}
	if _, err := g.RegisterAll(conns); !errors.Is(err, loader.ErrNotAttached) {
		t.Errorf("detached: %v, want %v", err, loader.ErrNotAttached)
	}
}

// A socket of its own is recorded with the process itself.
func TestRegisterOwn(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	testnet.StartGroup(t, ns, 1, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	g := attach(t, fs, ns, noSettle)
	var own []*net.UDPConn
	err := ns.Do(func() (err error) {
		own, err = sockets.ListenPacket(context.Background(), 1, "udp4", "127.0.0.1:1194")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer own[0].Close()
	if slot, err := g.Register(own[0]); slot != 1 || err != nil {
		t.Fatalf("slot %d, %v", slot, err)
	}
	if l := status(t, g).Listeners[1]; l.PID != os.Getpid() {
		t.Errorf("listener %+v, want one of process %d", l, os.Getpid())
	}
}

// BenchmarkRegister is the time of one RegisterAll of n sockets beside others.
func BenchmarkRegister(b *testing.B) {
	for _, c := range []struct{ others, n int }{{8, 1}, {8, 16}, {1000, 1}} {
		b.Run(fmt.Sprintf("others=%d/sockets=%d", c.others, c.n), func(b *testing.B) {
			ns, fs := testnet.New(b), loader.FS(testnet.BPFFS(b))
			listen := func(n int) (conns []syscall.Conn, end func()) {
				err := ns.Do(func() error {
					opened, err := sockets.ListenPacket(context.Background(), n, "udp4", "127.0.0.1:1194")
					for _, c := range opened {
						conns = append(conns, c)
					}
					end = func() {
						for _, c := range opened {
							c.Close()
						}
					}
					return err
				})
				if err != nil {
					b.Fatal(err)
				}
				return conns, end
			}
			members, end := listen(c.others)
			defer end()
			g, err := fs.Attach(members[0], noSettle)
			if err != nil {
				b.Fatal(err)
			}
			defer g.Close()
			for b.Loop() {
				b.StopTimer()
				conns, end := listen(c.n)
				b.StartTimer()
				answers, err := g.RegisterAll(conns)
				b.StopTimer()
				for _, a := range answers {
					if a.Err != nil {
						b.Fatal(a.Err)
					}
				}
				if err != nil {
					b.Fatal(err)
				}
				end()
				b.StartTimer()
			}
		})
	}
}
