package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
)

// A server registers its socket before it serves, drains it before it ends, and
// does without where there is no agent.
func Example() {
	dir, stop, err := startAgent()
	if err != nil {
		log.Fatal(err)
	}
	defer stop()

	ctx := context.Background()
	reuseport := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		})
	}}
	conn, err := reuseport.ListenPacket(ctx, "udp4", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	server := conn.(*net.UDPConn)

	here := agent.Client{Dir: dir} // agent.Client{} where the agent runs as usual
	switch slot, err := here.Register(ctx, server); {
	case err == nil:
		fmt.Println("sticky, in slot", slot)
	case errors.Is(err, agent.ErrNoAgent):
		fmt.Println("not sticky:", err)
	default:
		log.Fatal(err)
	}

	// … serve …

	if err := here.Drain(ctx, server); errors.Is(err, agent.ErrRefused) {
		fmt.Println(err)
	}
	// Output:
	// sticky, in slot 5
	// drain: the agent refused: the test says no
}
