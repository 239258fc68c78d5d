// Command server is a Go server as people write them: it answers whoever asks
// with its name. Once it is bound it prints its pid and address, and it ends with
// its input.
//
// Usage: server [-reuseport] [-mptcp=false] [-fork] NETWORK ADDRESS NAME
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	reuseport := flag.Bool("reuseport", false, "set SO_REUSEPORT")
	mptcp := flag.Bool("mptcp", true, "use MPTCP for TCP, as Go does")
	fork := flag.Bool("fork", false, "let an orphan in a session of its own do it")
	flag.Parse()
	network, address, name := flag.Arg(0), flag.Arg(1), flag.Arg(2)
	var err error
	if *fork {
		err = daemonise()
	} else {
		err = serve(*reuseport, *mptcp, network, address, name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(reuseport, mptcp bool, network, address, name string) error {
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(mptcp)
	if reuseport {
		lc.Control = func(_, _ string, raw syscall.RawConn) error {
			var err error
			return errors.Join(raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}), err)
		}
	}
	var bound net.Addr
	if strings.HasPrefix(network, "tcp") {
		l, err := lc.Listen(context.Background(), network, address)
		if err != nil {
			return err
		}
		bound = l.Addr()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprint(c, name)
				c.Close()
			}
		}()
	} else {
		c, err := lc.ListenPacket(context.Background(), network, address)
		if err != nil {
			return err
		}
		bound = c.LocalAddr()
		go func() {
			for {
				_, from, err := c.ReadFrom(make([]byte, 64))
				if err != nil {
					return
				}
				c.WriteTo([]byte(name), from)
			}
		}()
	}
	fmt.Println(os.Getpid(), bound)
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// daemonise starts the same server as an orphan.
func daemonise() error {
	var args []string
	for _, a := range os.Args[1:] {
		if a != "-fork" {
			args = append(args, a)
		}
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}
