// Package chaos has a test that does to a group, in random order, all that may
// happen to one, and compares after each step who answers 20 000 clients with
// what the promises say.
//
// RPSEL_SOAK=10m makes it run as long. RPSEL_CHAOS_SEED makes it draw what it drew
// before: the seed is printed.
package chaos
