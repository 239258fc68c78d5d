// Package flood has the test that floods a group: millions of packets from
// sources that do not exist, at full speed, while others go on talking.
//
// RPSEL_FLOOD=100000000 makes it send that many.
package flood
