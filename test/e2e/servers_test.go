package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// serve turns this program into one of the servers below, if a test started it
// as such, and then does not return.
func serve() {
	if len(os.Args) < 2 {
		return
	}
	servers := map[string]func([]string) error{"single": serveSingle, "web": serveWeb}
	server, ok := servers[os.Args[1]]
	if !ok {
		return
	}
	if err := server(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serving is what both servers say when they do.
const serving = "serving"

// startSelf starts this program as a server and returns when it serves.
func startSelf(t testing.TB, ns *testnet.NetNS, args ...string) *daemon {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d := launch(t, ns, args[0], exec.Command(self, args...))
	d.await(t, serving)
	return d
}

// singleWork is how long the server with one thread works on a request.
const singleWork = time.Millisecond

// startSingle starts a server with one thread that knows nothing of restarts: it
// takes one connection after the other, and SIGTERM just kills it.
func startSingle(t testing.TB, ns *testnet.NetNS, addr netip.AddrPort) *daemon {
	t.Helper()
	return startSelf(t, ns, "single", addr.String())
}

func serveSingle(args []string) error {
	listeners, err := sockets.Listen(context.Background(), 1, "tcp", args[0])
	if err != nil {
		return err
	}
	listener, err := listeners[0].File() // whose calls block
	if err != nil {
		return err
	}
	if err := errors.Join(listeners[0].Close(), unix.SetNonblock(int(listener.Fd()), false)); err != nil {
		return err
	}
	fmt.Println(serving)
	for {
		if conn, _, err := unix.Accept4(int(listener.Fd()), unix.SOCK_CLOEXEC); err == nil {
			answer(conn)
			unix.Close(conn)
		}
	}
}

// answer reads a request and answers it with the process's number.
func answer(conn int) {
	request := make([]byte, 1024)
	if n, err := unix.Read(conn, request); n <= 0 || err != nil {
		return
	}
	time.Sleep(singleWork)
	unix.Write(conn, fmt.Appendf(nil, "HTTP/1.0 200 OK\r\n\r\n%d", os.Getpid()))
}

// serveWeb is the Go server of docs/tcp.md. Its arguments are an address, how it is
// registered, and where: "agent DIR" asks the agent, as the user nobody; "loader
// BPFFS" does it itself; "plain -" does without.
func serveWeb(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	addr, how, where := args[0], args[1], args[2]
	if how == "agent" {
		if err := syscall.Setuid(nobody); err != nil {
			return os.NewSyscallError("setuid", err)
		}
	}
	listeners, err := sockets.Listen(ctx, 1, "tcp", addr)
	if err != nil {
		return err
	}
	listener := listeners[0]

	var open sync.WaitGroup
	server := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, strconv.Itoa(os.Getpid()))
		}),
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				open.Add(1)
			case http.StateClosed, http.StateHijacked:
				open.Done()
			}
		},
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	drain, err := register(ctx, listener, how, where)
	if err != nil {
		return err
	}
	fmt.Println(serving)
	<-ctx.Done()

	if err := drain(); err != nil {
		return err
	}
	if err := listener.Close(); err != nil { // what waits goes to others
		return err
	}
	if err := <-served; !errors.Is(err, net.ErrClosed) {
		return err
	}
	server.SetKeepAlivesEnabled(false)
	open.Wait()
	return nil
}

// register registers the listener of a web server, and returns how it drains it.
func register(ctx context.Context, l *net.TCPListener, how, where string) (drain func() error, err error) {
	switch how {
	case "agent":
		here := agent.Client{Dir: where}
		_, err := here.Register(ctx, l)
		return func() error { return here.Drain(context.Background(), l) }, err
	case "loader":
		group, err := loader.FS(where).Attach(l, loader.Options{})
		if err != nil {
			return nil, err
		}
		slot, err := group.Register(l)
		return func() error {
			defer group.Close()
			return group.Drain(slot)
		}, err
	}
	return func() error { return nil }, nil
}

// nobody is the user of that name.
const nobody = 65534
