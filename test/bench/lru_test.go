package bench

//go:generate go tool bpf2go -tags linux Lru lru.c -- -I../../bpf -Wall -Wextra -Werror
