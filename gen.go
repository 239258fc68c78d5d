// Package rpsel only carries the directives that compile the C under bpf/, see
// "make generate".
//
// The command is in cmd/rpsel, the library in loader and sockets.
package rpsel

//go:generate go tool bpf2go -output-dir bpf -go-package bpf -tags linux -type report Select bpf/select.c -- -Wall -Wextra -Werror
//go:generate go tool bpf2go -output-dir bpf -go-package bpf -tags linux -type stranger Conns bpf/conns.c -- -Wall -Wextra -Werror
//go:generate go tool bpf2go -output-dir bpf -go-package bpf -tags linux -type record Find bpf/find.c -- -Wall -Wextra -Werror
//go:generate go tool bpf2go -output-dir bpf -go-package bpf -tags linux Bind bpf/bind.c -- -Wall -Wextra -Werror
//go:generate go tool bpf2go -output-dir bpf -go-package bpf -tags linux -type event Watch bpf/watch.c -- -Wall -Wextra -Werror
//go:generate go tool bpf2go -output-dir bpf -go-package bpf -tags linux Netns bpf/netns.c -- -Wall -Wextra -Werror
