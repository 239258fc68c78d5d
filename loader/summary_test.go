package loader_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
)

// summary reads one group beside another one, as a scrape does.
func summary(t *testing.T, groups ...*loader.Group) loader.Summary {
	t.Helper()
	s := loader.Summarize(groups)[0]
	if s.Err != nil {
		t.Fatal(s.Err)
	}
	return s
}

// A summary says what the status says, whether its group is alone or not.
func TestSummarize(t *testing.T) {
	for _, network := range []string{"udp4", "tcp4"} {
		t.Run(network, func(t *testing.T) {
			fs := loader.FS(testnet.BPFFS(t))
			var groups []*loader.Group
			for range 2 {
				ns := testnet.New(t)
				servers := testnet.StartGroup(t, ns, 3, testnet.ServerOptions{Network: network, Addr: "127.0.0.1:1194", ReusePort: true})
				groups = append(groups, attach(t, fs, ns, noSettle))
				clients := testnet.NewClients(t, ns, 200, "127.0.0.1:1194")
				if network == "tcp4" {
					clients = testnet.NewTCPClients(t, ns, 200, "127.0.0.1:1194")
				}
				clients.Ask()
				servers.Close(0)
				clients.Ask()
			}
			same := cmp.Options{
				cmpopts.IgnoreFields(loader.Listener{}, "Recent", "Joined"), cmpopts.IgnoreFields(loader.Status{}, "Age"),
				cmpopts.EquateComparable(loader.Key{}), cmpopts.EquateErrors(),
			}
			for _, asked := range [][]*loader.Group{groups[:1], groups} {
				for i := range asked {
					var s loader.Summary
					var diff string
					// The servers may not have seen yet that connections have ended.
					for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
						s = loader.Summarize(asked)[i]
						if diff = cmp.Diff(status(t, asked[i]), s.Status, same); diff == "" {
							break
						}
					}
					if diff != "" || s.Err != nil {
						t.Errorf("%d of %d: %v, -status +summary:\n%s", i, len(asked), s.Err, diff)
					}
					if network == "udp4" && s.Listeners[1].Flows == 0 || s.Counters.Runs == 0 {
						t.Errorf("nothing is counted: %+v", s)
					}
				}
			}
		})
	}
}

// A group that gets another program after the search for sockets is attached all the same.
func TestSummarizeUpgrade(t *testing.T) {
	fs := loader.FS(testnet.BPFFS(t))
	var groups []*loader.Group
	for range 2 {
		ns := testnet.New(t)
		testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
		groups = append(groups, attach(t, fs, ns, noSettle))
	}
	defer loader.OtherProgram()()
	defer loader.AfterSearch(func() {
		if u, err := fs.Upgrade(groups[0].Key(), loader.UpgradeOptions{}); err != nil || !u.Program {
			t.Errorf("%+v, %v", u, err)
		}
	})()
	if s := summary(t, groups...); !s.Attached {
		t.Error("the program of an upgrade is not seen")
	}
}

// What a slot and a group have counted does not go down: not when another listener
// takes the slot, nor when that fails, nor by an upgrade. A group that is attached
// anew begins at zero.
func TestCountsOnlyRise(t *testing.T) {
	ns, fs := testnet.New(t), loader.FS(testnet.BPFFS(t))
	servers := testnet.StartGroup(t, ns, 2, testnet.ServerOptions{Network: "udp4", Addr: "127.0.0.1:1194", ReusePort: true})
	g := attach(t, fs, ns, noSettle)
	clients := testnet.NewClients(t, ns, 300, "127.0.0.1:1194")
	clients.Ask()
	clients.Ask()
	last := summary(t, g)
	risen := func(when string) loader.Summary {
		t.Helper()
		s := summary(t, g)
		if fallen(last.Counters, s.Counters) {
			t.Errorf("%s: from %+v to %+v", when, last.Counters, s.Counters)
		}
		for _, was := range last.Listeners {
			for _, is := range s.Listeners {
				if is.Slot == was.Slot && fallenSlot(was.Total, is.Total) {
					t.Errorf("%s: slot %d from %+v to %+v", when, is.Slot, was.Total, is.Total)
				}
			}
		}
		last = s
		return s
	}
	had := last.Listeners[0]
	servers.Close(0)
	clients.Ask()
	risen("a listener left")
	servers.Add()
	attach(t, fs, ns, loader.Options{})
	now := risen("another one came").Listeners[0]
	if now.Slot != had.Slot || now.Cookie == had.Cookie {
		t.Fatalf("the slot of %+v has %+v", had, now)
	}
	// The control: what is the listener's own begins anew.
	if now.Hit >= had.Hit || now.Total.Hit < had.Total.Hit || had.Hit == 0 {
		t.Errorf("the listener that left: %+v, the one that came: %+v", had, now)
	}
	clients.Ask()
	risen("it serves")

	servers.Close(1)
	clients.Ask()
	risen("the other one left")
	if err := g.Unseat(1); err != nil {
		t.Fatal(err)
	}
	if s := risen("its slot was not taken"); len(s.Listeners) != 1 {
		t.Errorf("listeners %+v", s.Listeners)
	}

	if _, err := fs.Upgrade(g.Key(), loader.UpgradeOptions{Flows: 1 << 16}); err != nil {
		t.Fatal(err)
	}
	clients.Ask()
	risen("it was upgraded")

	if _, err := fs.Detach(g.Key()); err != nil {
		t.Fatal(err)
	}
	if s := summary(t, attach(t, fs, ns, noSettle)); s.Counters != (loader.Counters{}) || s.Listeners[0].Total != (loader.Served{}) {
		t.Errorf("attached anew: %+v", s)
	}
}

// fallen tells whether a count is lower than it was.
func fallen(was, is loader.Counters) bool {
	return is.Runs < was.Runs || is.Hit < was.Hit || is.New < was.New || is.Rehomed < was.Rehomed || is.Untracked < was.Untracked ||
		is.Fallback < was.Fallback || is.Migrated < was.Migrated || is.ParseError < was.ParseError || is.TableFull < was.TableFull || is.Evicted < was.Evicted
}

func fallenSlot(was, is loader.Served) bool {
	return is.Hit < was.Hit || is.New < was.New || is.Rehomed < was.Rehomed || is.Untracked < was.Untracked || is.Migrated < was.Migrated || is.Bytes < was.Bytes
}
