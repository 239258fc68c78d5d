// Package docs holds the pages for users. What they show in blocks of sh is run by
// tests as it stands, see testnet.OpenPage; what cannot be is in blocks of bash, and
// the page says "No test runs this" and why.
package docs

import "embed"

// Pages are the pages by their paths here.
//
//go:embed *.md */*.md
var Pages embed.FS
