package main

import (
	"os/exec"
	"testing"
	"time"
)

// Versions sort as listed.
var versions = []struct{ git, want string }{
	{"05e03a9", "0~19700101000100.05e03a9"},
	{"05e03a9-dirty", "0~19700101000100.05e03a9+dirty"},
	{"unknown", "0~19700101000100.unknown"},
	{"v0.1.0", "0.1.0"},
	{"v0.9.0", "0.9.0"},
	{"v0.10.0-rc.1", "0.10.0~rc.1"},
	{"v0.10.0-rc.1-2-g05e03a9", "0.10.0~rc.1+2.g05e03a9"},
	{"v0.10.0-rc.2", "0.10.0~rc.2"},
	{"v0.10.0", "0.10.0"},
	{"v0.10.0-dirty", "0.10.0+dirty"},
	{"1.0.0", "1.0.0"},
	{"1.0.0-3-g05e03a9", "1.0.0+3.g05e03a9"},
	{"1.0.0-12-g15e03a9-dirty", "1.0.0+12.g15e03a9+dirty"},
}

func TestPackageVersion(t *testing.T) {
	last := ""
	for _, v := range versions {
		got := packageVersion(v.git, time.Unix(60, 0).UTC())
		if got != v.want {
			t.Errorf("%s: %s, want %s", v.git, got, v.want)
		}
		// What begins with the hash of a commit sorts by its time, not among each other.
		if last != "" && v.git != "unknown" {
			if err := exec.Command("dpkg", "--compare-versions", last, "lt", got).Run(); err != nil {
				t.Errorf("dpkg: %s lt %s: %v", last, got, err)
			}
		}
		last = got
	}
}
