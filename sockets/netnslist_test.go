package sockets_test

import (
	"slices"
	"testing"
	"time"

	"github.com/rpsel/rpsel/internal/testnet"
	"github.com/rpsel/rpsel/sockets"
)

// The kernel lists a namespace as long as anything keeps it, and no longer.
func TestNetNSCookies(t *testing.T) {
	testnet.Privileged(t)
	lists := func(cookie uint64) bool {
		t.Helper()
		cookies, err := sockets.NetNSCookies()
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(cookies, cookie)
	}
	own, err := sockets.OpenNetNS("")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	var held *sockets.NetNS
	t.Run("exists", func(t *testing.T) {
		ns := testnet.New(t)
		if !lists(ns.Cookie()) || !lists(own.Cookie()) {
			t.Error("it is not listed")
		}
		if held, err = sockets.OpenNetNS(ns.Path()); err != nil {
			t.Fatal(err)
		}
	})
	if !lists(held.Cookie()) {
		t.Error("a descriptor keeps it, and it is not listed")
	}
	cookie := held.Cookie()
	held.Close()
	// The kernel cleans up in the background.
	for deadline := time.Now().Add(time.Minute); lists(cookie); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it is listed still")
		}
	}
}
