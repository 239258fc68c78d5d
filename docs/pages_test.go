package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A test runs the scripts of every page, or the page says why not.
func TestPages(t *testing.T) {
	var tests strings.Builder
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") && !strings.HasSuffix(path, ".txtar") {
			return err
		}
		text, err := os.ReadFile(path)
		tests.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	err = fs.WalkDir(Pages, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := fs.ReadFile(Pages, path)
		run := regexp.MustCompile(`OpenPage\(\w+, "` + regexp.QuoteMeta(path) + `"\)|(?m:^page ` + regexp.QuoteMeta(path) + `\b)`)
		if strings.Contains(string(text), "\n```sh\n") && !run.MatchString(tests.String()) {
			t.Errorf("no test runs the scripts of %s: see testnet.OpenPage", path)
		}
		if strings.Contains(string(text), "\n```bash\n") && !strings.Contains(string(text), "No test runs this") {
			t.Errorf("%s does not say why no test runs its scripts of bash", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
