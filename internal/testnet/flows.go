package testnet

import "slices"

// Moved counts the flows that another server answers after than before. Flows
// whose earlier server is in except had to move and do not count, nor do those
// that had no answer before.
func Moved(before, after []string, except ...string) int {
	moved := 0
	for i, server := range before {
		if server != "" && server != after[i] && !slices.Contains(except, server) {
			moved++
		}
	}
	return moved
}

// Shares counts the flows of each server. The server of flows without an
// answer is "".
func Shares(answers []string) map[string]int {
	shares := make(map[string]int)
	for _, server := range answers {
		shares[server]++
	}
	return shares
}
