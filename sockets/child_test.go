package sockets_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/rpsel/rpsel/sockets"
)

// asChild is what the test binary does when a test starts it as another
// process. It prints what the test compares.
func asChild(do string) int {
	switch do {
	case "find":
		_, err := sockets.Find(sockets.Query{Port: 1})
		return printPermission(err)
	case "take":
		pid, _ := strconv.Atoi(os.Args[1])
		_, err := sockets.Take(sockets.Holder{PID: pid, FD: 0, Command: "server"}, 1)
		return printPermission(err)
	case "pid":
		return printOwnPID()
	default:
		fmt.Printf("unknown test child %q\n", do)
		return 1
	}
}

func printPermission(err error) int {
	fmt.Println(err)
	if !errors.Is(err, sockets.ErrPermission) {
		return 1
	}
	return 0
}

// printOwnPID prints the process that Find says holds a socket of this one,
// first when it looks into all, then into this one only.
func printOwnPID() int {
	conns, err := sockets.ListenPacket(context.Background(), 1, "udp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer conns[0].Close()
	key, err := sockets.KeyOf(conns[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for _, pid := range []int{0, os.Getpid()} {
		groups, err := sockets.Find(sockets.Query{NetNS: key.NetNS, Port: key.Addr.Port(), PID: pid})
		if err != nil || len(groups) != 1 || len(groups[0].Members) != 1 || len(groups[0].Members[0].Holders) != 1 {
			fmt.Println(groups, err)
			return 1
		}
		fmt.Println(groups[0].Members[0].Holders[0].PID)
	}
	return 0
}
