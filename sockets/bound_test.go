package sockets_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/rpsel/rpsel/sockets"
)

// What is bound to a port is listed with its cookie, at every address and of
// both families, and nothing else.
func TestBound(t *testing.T) {
	for _, proto := range []sockets.Proto{sockets.UDP, sockets.TCP} {
		t.Run(proto.String(), func(t *testing.T) {
			const port = 1194
			netNS(t)
			bind(t, proto.String()+"4", "127.0.0.1:1194", reuseport)
			outside, err := sockets.OpenNetNS("")
			must(t, err)
			defer outside.Close()

			netNS(t)
			if got, err := sockets.Bound(proto, port); err != nil || len(got) != 0 {
				t.Errorf("in an empty namespace: %v, %v", got, err)
			}
			ls := []listener{
				bind(t, proto.String()+"4", "0.0.0.0:1194", reuseport),
				bind(t, proto.String()+"4", "0.0.0.0:1194", reuseport),
				bind(t, proto.String()+"4", "127.0.0.1:1194", reuseport),
				bind(t, proto.String()+"6", "[::]:1194", reuseport),
			}
			bind(t, proto.String()+"4", "127.0.0.1:1195")
			other := map[sockets.Proto]string{sockets.UDP: "tcp4", sockets.TCP: "udp4"}[proto]
			bind(t, other, "127.0.0.1:1194")
			if proto == sockets.TCP {
				// A connection has the port as well, but does not listen.
				answering(t, ls[2:3])
			}

			got, err := sockets.Bound(proto, port)
			must(t, err)
			want := cookies(t, ls...)
			slices.Sort(got)
			slices.Sort(want)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			must(t, outside.Do(func() error {
				got, err = sockets.Bound(proto, port)
				return err
			}))
			if len(got) != 1 || slices.Contains(want, got[0]) {
				t.Errorf("in the other namespace: %v", got)
			}
		})
	}
}

func BenchmarkBound(b *testing.B) {
	netNS(b)
	bind(b, "udp4", "127.0.0.1:1194", reuseport)
	for b.Loop() {
		if got, err := sockets.Bound(sockets.UDP, 1194); err != nil || len(got) != 1 {
			b.Fatal(got, err)
		}
	}
}
