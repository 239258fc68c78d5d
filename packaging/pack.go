package main

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/deb"
	"github.com/goreleaser/nfpm/v2/files"
	_ "github.com/goreleaser/nfpm/v2/rpm"
)

const (
	configDir  = "/etc/rpsel"
	docDir     = "/usr/share/doc/rpsel"
	licenseDir = "/usr/share/licenses/rpsel"
)

// pack makes a package.
func (r release) pack(format, arch, staged, binary string) error {
	contents, err := r.contents(format, staged, binary)
	if err != nil {
		return err
	}
	scripts := filepath.Join(r.source, "packaging", "scripts")
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: "rpsel", Arch: arch, Platform: "linux",
		Version: packageVersion(r.version, r.time), VersionSchema: "none", MTime: r.time,
		Section: "net", Priority: "optional",
		Maintainer: "rpsel maintainers <rpsel@users.noreply.github.com>",
		Homepage:   "https://github.com/rpsel/rpsel",
		License:    "GPL-2.0-only OR MIT",
		Description: "make SO_REUSEPORT ports sticky\n" +
			"A BPF program attached to the sockets of running servers keeps each flow with\n" +
			"its listener, whatever listeners join, leave or restart. For OpenVPN with a\n" +
			"process per core, QUIC, TURN, RADIUS and others, unmodified.",
		Overridables: nfpm.Overridables{
			Contents: contents,
			Scripts: nfpm.Scripts{
				PostInstall: filepath.Join(scripts, "postinst"),
				PreRemove:   filepath.Join(scripts, "prerm"),
				PostRemove:  filepath.Join(scripts, "postrm"),
			},
			RPM: nfpm.RPM{BuildHost: "localhost", Summary: "Make SO_REUSEPORT ports sticky"},
		},
	})
	if err := nfpm.PrepareForPackager(info, format); err != nil {
		return err
	}
	packager, err := nfpm.Get(format)
	if err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(r.out, packager.ConventionalFileName(info)))
	if err != nil {
		return err
	}
	defer file.Close()
	if err := packager.Package(info, file); err != nil {
		return err
	}
	return file.Close()
}

// contents lists a package's files.
func (r release) contents(format, staged, binary string) (list files.Contents, err error) {
	add := func(source, to, kind string, mode fs.FileMode) {
		list = append(list, &files.Content{Source: source, Destination: to, Type: kind, FileInfo: &files.ContentFileInfo{Mode: mode}})
	}
	source := func(name string) string { return filepath.Join(r.source, name) }
	add(binary, "/usr/bin/rpsel", "", 0o755)
	add(source("packaging/rpsel.toml"), configDir+"/rpsel.toml", files.TypeConfigNoReplace, 0o644)
	add(source("docs/systemd/rpsel-agent.service"), "/usr/lib/systemd/system/rpsel-agent.service", "", 0o644)

	add(filepath.Join(staged, "bash"), "/usr/share/bash-completion/completions/rpsel", "", 0o644)
	add(filepath.Join(staged, "fish"), "/usr/share/fish/vendor_completions.d/rpsel.fish", "", 0o644)
	zsh, license, licenseType := "/usr/share/zsh/vendor-completions/_rpsel", docDir+"/copyright", ""
	if format == "rpm" {
		zsh, license, licenseType = "/usr/share/zsh/site-functions/_rpsel", licenseDir+"/LICENSE", files.TypeRPMLicense
	}
	add(filepath.Join(staged, "zsh"), zsh, "", 0o644)
	add(source("LICENSE"), license, licenseType, 0o644)

	pages, err := filepath.Glob(filepath.Join(staged, "man", "*.gz"))
	if err != nil {
		return nil, err
	}
	for _, page := range pages {
		section := strings.TrimPrefix(path.Ext(strings.TrimSuffix(page, ".gz")), ".")
		add(page, "/usr/share/man/man"+section+"/"+filepath.Base(page), "", 0o644)
	}

	for _, name := range []string{"README.md", "ARCHITECTURE.md", "CHANGELOG.md"} {
		add(source(name), docDir+"/"+name, "", 0o644)
	}
	err = filepath.WalkDir(source("docs"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(r.source, path)
		add(path, docDir+"/"+filepath.ToSlash(name), "", 0o644)
		return err
	})
	if err != nil {
		return nil, err
	}

	// Directories that go when the package does.
	var own []string
	for _, c := range list {
		for dir := path.Dir(c.Destination); dir != "/"; dir = path.Dir(dir) {
			rpsels := slices.ContainsFunc([]string{configDir, docDir, licenseDir}, func(d string) bool {
				return dir == d || strings.HasPrefix(dir, d+"/")
			})
			if rpsels && !slices.Contains(own, dir) {
				own = append(own, dir)
			}
		}
	}
	for _, dir := range own {
		add("", dir, files.TypeDir, 0o755)
	}
	return list, nil
}
