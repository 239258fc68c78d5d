package testnet

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// Counts are what the kernel has counted in the namespace of IPv4 and of TCP, by the
// names of nstat(8), without those that are zero.
func (n *NetNS) Counts(t testing.TB) map[string]int {
	t.Helper()
	counts := map[string]int{}
	for _, file := range []string{"snmp", "netstat"} {
		var text []byte
		must(t, n.Do(func() (err error) {
			text, err = os.ReadFile("/proc/thread-self/net/" + file)
			return err
		}))
		lines := strings.Split(string(text), "\n")
		for i := 0; i+1 < len(lines); i += 2 { // a line of names, and one of numbers
			group, names, _ := strings.Cut(lines[i], ":")
			_, numbers, _ := strings.Cut(lines[i+1], ":")
			values := strings.Fields(numbers)
			for at, name := range strings.Fields(names) {
				count, err := strconv.Atoi(values[at])
				must(t, err)
				if count != 0 {
					counts[group+name] = count
				}
			}
		}
	}
	return counts
}
