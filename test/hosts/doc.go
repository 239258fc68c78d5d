// Package hosts tries rpsel below a balancer: a router with a resilient next-hop
// group over namespaces that are hosts. Its commands are those of docs/hosts.md.
package hosts
