// Package comm makes the names that processes give themselves fit to be shown.
package comm

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Printable makes a process's name, up to 15 bytes, fit for a terminal and a
// line: every process may give itself any name, with line feeds and escape
// sequences too. What is not printable becomes a question mark.
func Printable(name []byte) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, string(name))
}
