// A module of its own, so that rpsel does not depend on a QUIC implementation.
module github.com/rpsel/rpsel/examples/quic

go 1.26.0

require (
	github.com/quic-go/quic-go v0.65.0
	github.com/rpsel/rpsel v0.0.0
)

require (
	github.com/cilium/ebpf v0.22.0 // indirect
	github.com/vishvananda/netlink v1.3.1 // indirect
	github.com/vishvananda/netns v0.0.5 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	golang.org/x/crypto v0.57.0 // indirect
	golang.org/x/net v0.59.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

replace github.com/rpsel/rpsel => ../..
