package main

import (
	"regexp"
	"strings"
	"time"
)

// described is what git describe --tags --always --dirty says where there is a tag.
var described = regexp.MustCompile(`^v?(\d[0-9A-Za-z.]*)(?:-([0-9A-Za-z.]+?))??(?:-(\d+)-(g[0-9a-f]+))?(-dirty)?$`)

// packageVersion makes a version that both dpkg and rpm take, and sort as git does: 1.2.0~rc1
// is before 1.2.0, 1.2.0+3.g0abc after it. What has no tag is sorted by its time, before
// all that has one.
func packageVersion(version string, at time.Time) string {
	m := described.FindStringSubmatch(version)
	if m == nil || !strings.Contains(m[1], ".") {
		commit, dirty := strings.CutSuffix(version, "-dirty")
		v := "0~" + at.Format("20060102150405") + "." + regexp.MustCompile(`[^0-9A-Za-z.]+`).ReplaceAllString(commit, ".")
		if dirty {
			v += "+dirty"
		}
		return v
	}
	v := m[1]
	if m[2] != "" {
		v += "~" + m[2]
	}
	if m[3] != "" {
		v += "+" + m[3] + "." + m[4]
	}
	if m[5] != "" {
		v += "+dirty"
	}
	return v
}
