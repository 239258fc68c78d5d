package main

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What Go programs rely on changes on purpose only.
func TestAPI(t *testing.T) {
	now, err := list()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../api.txt")
	if err != nil {
		t.Fatal(err)
	}
	then := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
	for _, line := range then {
		if !slices.Contains(now, line) {
			t.Errorf("gone or changed, which breaks programs that use it: %s\n\tif that is meant say so in CHANGELOG.md, and \"make api\" writes api.txt anew", line)
		}
	}
	for _, line := range now {
		if !slices.Contains(then, line) {
			t.Errorf("new: %s\n\t\"make api\" writes api.txt anew", line)
		}
	}
}

// Nothing of the API is of a package that is not, unless by an alias.
func TestAPIIsWhole(t *testing.T) {
	now, err := list()
	if err != nil {
		t.Fatal(err)
	}
	ours := regexp.MustCompile(module + `/[a-z/]+\.\w+`)
	var aliased []string
	for _, line := range now {
		if name, target, ok := strings.Cut(line, " = "); ok && strings.Contains(name, ": type ") {
			aliased = append(aliased, target)
		}
	}
	for _, line := range now {
		for _, name := range ours.FindAllString(line, -1) {
			if !slices.Contains(aliased, name) {
				t.Errorf("%s: %s is of no public package, and no public type is an alias of it", line, name)
			}
		}
	}
}
