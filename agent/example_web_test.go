package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/sockets"
)

// A web server without privileges, any number of which may share the port: it
// registers before it serves, and loses no request when it leaves.
func Example_webServer() {
	dir, stop, err := startAgent()
	if err != nil {
		log.Fatal(err)
	}
	defer stop()
	ctx := context.Background()

	listeners, err := sockets.Listen(ctx, 1, "tcp", "127.0.0.1:0") // with SO_REUSEPORT, and without MPTCP
	if err != nil {
		log.Fatal(err)
	}
	listener := listeners[0]
	var open sync.WaitGroup // connections
	server := http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }),
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

	here := agent.Client{Dir: dir} // agent.Client{} where the agent runs as usual
	slot, err := here.Register(ctx, listener)
	if err != nil && !errors.Is(err, agent.ErrNoAgent) {
		log.Fatal(err)
	}
	fmt.Println("in slot", slot)

	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + listener.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	body, _ := io.ReadAll(response.Body)
	response.Body.Close()
	fmt.Printf("%s\n", body)

	// On SIGTERM: no new connections, those it has to their end, and out. Shutdown
	// would drop what it has taken and not read from yet.
	if err := here.Drain(ctx, listener); err != nil {
		fmt.Println(err) // it leaves all the same
	}
	listener.Close() // the connections that wait in it go to other processes
	<-served
	server.SetKeepAlivesEnabled(false) // the next answer to each client is the last
	open.Wait()
	fmt.Println("left")
	// Output:
	// in slot 5
	// hello
	// drain: the agent refused: the test says no
	// left
}
