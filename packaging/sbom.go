package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"os"
	"strings"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// writeSBOM lists what a binary is made of, as the binary itself says it: the modules that
// are linked, and the Go they were compiled with.
func (r release) writeSBOM(binary, arch string) error {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return err
	}
	root := &cdx.Component{
		Type: cdx.ComponentTypeApplication, Name: "rpsel", Version: r.version,
		BOMRef: purl(info.Main.Path, r.version), PackageURL: purl(info.Main.Path, r.version),
		Licenses: &cdx.Licenses{{Expression: "GPL-2.0-only OR MIT"}},
	}
	goVersion := strings.TrimPrefix(info.GoVersion, "go")
	components := []cdx.Component{{
		Type: cdx.ComponentTypeLibrary, Name: "std", Version: goVersion,
		BOMRef: purl("std", goVersion), PackageURL: purl("std", goVersion),
	}}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		c := cdx.Component{
			Type: cdx.ComponentTypeLibrary, Name: m.Path, Version: m.Version,
			BOMRef: purl(m.Path, m.Version), PackageURL: purl(m.Path, m.Version),
		}
		if sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(m.Sum, "h1:")); err == nil && len(sum) > 0 {
			c.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: hex.EncodeToString(sum)}} // as in go.sum
		}
		components = append(components, c)
	}
	refs := make([]string, 0, len(components))
	for _, c := range components {
		refs = append(refs, c.BOMRef)
	}
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Timestamp: r.time.Format(time.RFC3339), Component: root}
	bom.Components = &components
	bom.Dependencies = &[]cdx.Dependency{{Ref: root.BOMRef, Dependencies: &refs}}
	var b bytes.Buffer
	if err := cdx.NewBOMEncoder(&b, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return err
	}
	return os.WriteFile(r.path(arch, ".cdx.json"), b.Bytes(), 0o644)
}

// purl names a Go module everywhere.
func purl(module, version string) string { return "pkg:golang/" + module + "@" + version }
