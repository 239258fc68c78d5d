// Package bench measures what the project promises to be quick. Nothing here
// fails because a machine is slow.
//
//	go test ./test/bench -run ^$ -bench . -benchtime 300x
package bench
