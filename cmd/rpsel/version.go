package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/maps"
)

// version is set by the linker in releases; else the build knows it.
var version string

func newVersionCmd(e *env) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "version",
		Short:   "Print the versions of rpsel, its state, Go and the kernel",
		Example: `  rpsel version -j`,
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			kernel, err := kernelRelease()
			if err != nil {
				return err
			}
			name, commit := ownVersion()
			if asJSON {
				return writeJSON(e.out, struct {
					Schema  int    `json:"schema"`
					Version string `json:"version"`
					Commit  string `json:"commit"`
					ABI     int    `json:"abi"`
					Go      string `json:"go"`
					Kernel  string `json:"kernel"`
				}{schema, name, commit, maps.ABI, runtime.Version(), kernel})
			}
			if commit != "" {
				name += " (" + commit + ")"
			}
			_, err = fmt.Fprintf(e.out, "rpsel %s\nstate layout %d\n%s\nLinux %s\n", name, maps.ABI, runtime.Version(), kernel)
			return err
		},
	}
	addJSONFlag(cmd, &asJSON)
	return cmd
}

// ownVersion returns rpsel's version and, if the build knows it, its commit.
func ownVersion() (name, commit string) {
	name = version
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return name, ""
	}
	if name == "" {
		name = info.Main.Version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			commit = s.Value
		}
	}
	if name == "" {
		name = "(devel)"
	}
	return name, commit
}

// kernelRelease is what uname -r prints.
func kernelRelease() (string, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(uts.Release[:]), nil
}
