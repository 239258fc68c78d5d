package demo

import (
	"context"
	"fmt"
	"io"

	"github.com/rpsel/rpsel/sockets"
)

// ready is what a listener reports when it is bound.
const ready = "ready\n"

// Serve is a listener: it answers each packet with its name, until control
// ends. It writes to report when it is bound.
func Serve(name string, control io.Reader, report io.Writer) error {
	conns, err := sockets.ListenPacket(context.Background(), 1, "udp4", address.String())
	if err != nil {
		return err
	}
	conn := conns[0]
	defer conn.Close()
	if _, err := fmt.Fprint(report, ready); err != nil {
		return err
	}
	go func() {
		// Whether it ends well or not, the demo is over.
		_, _ = io.Copy(io.Discard, control)
		conn.Close()
	}()
	packet := make([]byte, 64)
	for {
		_, client, err := conn.ReadFrom(packet)
		if err != nil {
			return nil // closed
		}
		// A client that is gone needs no answer.
		_, _ = conn.WriteTo([]byte(name), client)
	}
}
