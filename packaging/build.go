package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// build compiles the command for an architecture, as every machine compiles it.
func (r release) build(arch string) (path string, err error) {
	if path, err = filepath.Abs(r.path(arch, "")); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags=-s -w -X main.version="+r.version, "-o", path, "./cmd/rpsel")
	cmd.Dir = r.source
	// An empty GOFLAGS would leave those of "go env -w" in force.
	cmd.Env = append(os.Environ(), "GOFLAGS=-trimpath", "GOWORK=off", "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build for %s: %w\n%s", arch, err, out)
	}
	return path, os.Chmod(path, 0o755)
}

// stage lets the command write its manual, compressed, and its completions.
func (r release) stage(dir, binary string) error {
	output := func(args ...string) ([]byte, error) {
		cmd := exec.Command(binary, args...)
		cmd.Env = append(os.Environ(), fmt.Sprintf("SOURCE_DATE_EPOCH=%d", r.time.Unix()))
		var talk bytes.Buffer
		cmd.Stderr = &talk
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("%s: %w\n%s", cmd, err, talk.Bytes())
		}
		return out, err
	}
	for _, shell := range []string{"bash", "fish", "zsh"} {
		script, err := output("completion", shell)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, shell), script, 0o644); err != nil {
			return err
		}
	}
	if _, err := output("manual", filepath.Join(dir, "man")); err != nil {
		return err
	}
	pages, err := filepath.Glob(filepath.Join(dir, "man", "*"))
	if err != nil {
		return err
	}
	for _, page := range pages {
		if err := compress(page); err != nil {
			return err
		}
	}
	return nil
}

// compress replaces a file by its .gz, which has no time and no name in it.
func compress(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return err
	}
	if _, err := w.Write(text); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := os.WriteFile(path+".gz", b.Bytes(), 0o644); err != nil {
		return err
	}
	return os.Remove(path)
}
