// Command quic is a QUIC server that shares its port with others of its kind: start as
// many as there are cores, start another one while they run, end one, and no client of
// the others notices.
//
//	quic -listen 127.0.0.1:4433 -name one -secret something &
//	quic -listen 127.0.0.1:4433 -name two -secret something &
//
// It answers each stream with its name. SIGTERM makes it take no new connection, and end
// with its last one.
//
// # What rpsel does for QUIC, and what it does not
//
// A connection lives in one process. On plain Linux its packets go to another one as soon
// as the number of sockets on the port changes, and that process knows nothing of it: the
// connection is reset. With rpsel they go on to the process that has it.
//
// When a process dies its connections are lost, and only they: their next packets go to
// another process, which resets them at once if it has the same StatelessResetKey, so
// that clients connect anew without waiting for a timeout.
//
// A client to whom a NAT gives another port is by default a new flow, which goes to its own
// process by chance only, and is reset by another. With loader.AffinityClient the address
// alone counts, and it keeps its connection (-affinity client; everybody behind one NAT is
// then served by one process).
//
// A client that migrates of its own accord probes its new path first. Where that leads to
// another process nobody answers, and the connection stays on the path that it had, as long
// as there is one.
//
// A client that comes from another address, of another network, is another client to rpsel.
// To follow it takes connection IDs that name the server (QUIC-LB), and a program that reads
// them. AffinityBytes cannot stand in for that: in the first packets of a connection the ID
// is at another place than in the others, and a client that migrates takes another ID.
package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"io"
	"log"
	"math/big"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// protocol is what clients and servers agree to speak (ALPN).
const protocol = "rpsel-example"

// idle is how long a connection may be silent. rpsel remembers it for as long.
const idle = 5 * time.Minute

func main() {
	var s server
	flag.StringVar(&s.address, "listen", "127.0.0.1:4433", "address that all servers share")
	flag.StringVar(&s.name, "name", "server", "what to answer with")
	flag.StringVar(&s.secret, "secret", "", "what the servers of the port have in common")
	flag.StringVar(&s.affinity, "affinity", "flow", "what counts as the same client")
	flag.StringVar(&s.bpffs, "bpffs", "", "where rpsel's state is")
	flag.BoolVar(&s.plain, "plain", false, "do without rpsel")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := s.run(ctx); err != nil {
		log.Fatal(err)
	}
}

type server struct {
	address, name, secret, affinity, bpffs string
	plain                                  bool
	open                                   atomic.Int64 // connections, and handshakes
}

// run serves until the context ends, and then until the last connection does.
func (s *server) run(ctx context.Context) error {
	conns, err := sockets.ListenPacket(ctx, 1, "udp", s.address)
	if err != nil {
		return err
	}
	conn := conns[0]
	defer conn.Close()

	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	resets, tokens := quic.StatelessResetKey(s.key("resets")), quic.TokenGeneratorKey(s.key("tokens"))
	transport := &quic.Transport{Conn: conn, StatelessResetKey: &resets, TokenGeneratorKey: &tokens, ConnContext: s.count}
	defer transport.Close()
	listener, err := transport.Listen(
		&tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{protocol}},
		&quic.Config{MaxIdleTimeout: idle})
	if err != nil {
		return err
	}

	leave := func() error { return nil }
	if !s.plain {
		// The first server makes the port sticky, the others join it. Nobody was
		// connected before, so there is nothing to settle. To rpsel a client is new
		// until it has sent something after its first second: it may be silent then.
		group, err := loader.FS(s.bpffs).Attach(conn, loader.Options{
			Affinity: loader.Affinity(s.affinity), Settle: -1, Idle: idle, IdleNew: idle,
		})
		if err != nil {
			return err
		}
		defer group.Close() // the kernel goes on
		slot, err := group.Slot(conn)
		if err != nil {
			return err
		}
		leave = func() error { return group.Drain(slot) }
	}
	fmt.Println("serving")

	go func() {
		for {
			c, err := listener.Accept(context.Background())
			if err != nil {
				return // the listener is closed
			}
			go s.serve(c)
		}
	}()
	<-ctx.Done()
	if err := leave(); err != nil { // new clients go to the others
		return err
	}
	// Who has sent his first packet before is let in. It is read by the first look.
	for look := time.Tick(time.Second); ; {
		<-look
		if s.open.Load() == 0 {
			return listener.Close()
		}
	}
}

// count counts a connection from its first packet to its end.
func (s *server) count(ctx context.Context, _ *quic.ClientInfo) (context.Context, error) {
	s.open.Add(1)
	context.AfterFunc(ctx, func() { s.open.Add(-1) })
	return ctx, nil
}

// serve answers each stream of a connection.
func (s *server) serve(c *quic.Conn) {
	for {
		stream, err := c.AcceptStream(context.Background())
		if err != nil {
			return // the connection has ended
		}
		go func() {
			defer stream.Close()
			if _, err := io.Copy(io.Discard, stream); err == nil {
				io.WriteString(stream, s.name) // the client may be gone
			}
		}()
	}
}

// key is one that all servers of the port have.
func (s *server) key(purpose string) [32]byte { return sha256.Sum256([]byte(purpose + s.secret)) }

// selfSigned makes a certificate that a client has no reason to believe.
func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	certificate, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{certificate}, PrivateKey: key}, err
}
