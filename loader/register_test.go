package loader_test

import (
	"context"
	"fmt"
	"syscall"
	"testing"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

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
