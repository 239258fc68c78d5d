package loader_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// web is a server that can leave without losing a request. Shutdown alone cannot:
// it drops the connections that it has taken and not read from yet, and those that
// wait in the listener.
type web struct {
	http.Server
	open   sync.WaitGroup // connections
	served chan error
}

func serveWeb(listener net.Listener, name string) *web {
	w := &web{served: make(chan error, 1)}
	w.Handler = http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, name) })
	w.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			w.open.Add(1)
		case http.StateClosed, http.StateHijacked:
			w.open.Done()
		}
	}
	go func() { w.served <- w.Serve(listener) }()
	return w
}

// leave ends a server whose listener drains, so that no new connections come.
func (w *web) leave(listener net.Listener) {
	listener.Close() // the connections that wait in it go to other processes
	<-w.served
	w.SetKeepAlivesEnabled(false) // the next answer to each client is the last
	w.open.Wait()
}

// until waits for what the clients of the example do.
func until(done func() bool) {
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			log.Fatal("the clients stand still")
		}
	}
}

// A web server is replaced while clients ask. The two processes are one here; what
// each does, it does for itself.
func Example_webServer() {
	ctx := context.Background()
	first, err := sockets.Listen(ctx, 1, "tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	address := first[0].Addr().String()
	old := serveWeb(first[0], "old")
	group, err := loader.Attach(first[0], loader.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer loader.DefaultFS.Detach(group.Key())
	defer group.Close()

	var asked, failed, answeredByNew atomic.Int64
	stop, clients := make(chan struct{}), sync.WaitGroup{}
	for range 8 {
		clients.Go(func() {
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			for {
				select {
				case <-stop:
					return
				default:
				}
				asked.Add(1)
				response, err := client.Get("http://" + address)
				if err != nil {
					failed.Add(1)
					continue
				}
				if name, _ := io.ReadAll(response.Body); string(name) == "new" {
					answeredByNew.Add(1)
				}
				response.Body.Close()
			}
		})
	}
	until(func() bool { return asked.Load() > 100 })

	// The new process listens on the same address, and registers.
	second, err := sockets.Listen(ctx, 1, "tcp", address)
	if err != nil {
		log.Fatal(err)
	}
	next := serveWeb(second[0], "new")
	if _, err := group.Register(second[0]); err != nil { // of loader.Open
		log.Fatal(err)
	}
	until(func() bool { return answeredByNew.Load() > 0 })

	// The old one, on SIGTERM: no new connections, those it has to their end, and out.
	slot, err := group.Slot(first[0])
	if err != nil {
		log.Fatal(err)
	}
	if err := group.Drain(slot); err != nil {
		log.Fatal(err)
	}
	old.leave(first[0])

	before := answeredByNew.Load()
	until(func() bool { return answeredByNew.Load() > before+100 })
	close(stop)
	clients.Wait()
	next.Close()
	fmt.Println("requests failed:", failed.Load())
	// Output: requests failed: 0
}
