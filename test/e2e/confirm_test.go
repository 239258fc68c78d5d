package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
)

// With --confirm reply who knows the servers' key is confirmed, and whoever does not
// stays new, though his packets look like those of a client. Without a key, the
// control, OpenVPN answers everybody, and so everybody is confirmed.
func TestOpenVPNConfirmReply(t *testing.T) {
	const strangers = 20
	for _, key := range []bool{true, false} {
		t.Run(fmt.Sprintf("tls-crypt %v", key), func(t *testing.T) {
			t.Parallel()
			v := newVPN(t)
			if key {
				file := filepath.Join(v.dir, "tls-crypt.key")
				if out, err := v.ns.Command(v.openvpn, "--genkey", "secret", file).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
				v.common = "tls-crypt " + file
			}
			r := newRpsel(t, v.servers, vpnPort)
			defer r.explain()
			v.startServer(1, r.run()...)
			v.startServer(2, r.run()...)
			r.attach("--settle", "0s", "--confirm", "reply")
			clients := v.connectUntil(4, 2, 1)

			// The client's first packet: HARD_RESET_CLIENT_V2, session id, no acks, packet 0.
			reset := append([]byte{7 << 3}, make([]byte, 8+1+4)...)
			v.must(v.ns.Do(func() error {
				to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(v.servers.IPv4, vpnPort))
				for i := range strangers {
					c, err := net.DialUDP("udp4", nil, to)
					if err != nil {
						return err
					}
					t.Cleanup(func() { c.Close() })
					reset[1] = byte(i + 1)
					if _, err := c.Write(reset); err != nil {
						return err
					}
				}
				return nil
			}))
			want := len(clients)
			if !key {
				want += strangers
			}
			r.await(fmt.Sprint(want, " flows established"), func(s status) bool {
				f := s.Groups[0].Flows
				return f.Tracked == len(clients)+strangers && f.Established == want
			})
			from := v.round()
			v.finish(from + 3)
			v.lostNone("with strangers around", clients, from, from+3)
			r.await(fmt.Sprint(want, " flows established still"), func(s status) bool { return s.Groups[0].Flows.Established == want })
		})
	}
}
