package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/rpsel/rpsel/agent"
	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/loader"
)

// newManualCmd is for who makes packages.
func newManualCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    "manual DIR",
		Short:  "Write the manual pages into a directory",
		Hidden: true,
		Args:   oneArg("directory"),
		RunE: func(cmd *cobra.Command, args []string) error {
			date, err := manualDate()
			if err != nil {
				return err
			}
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			for name, page := range manual(cmd.Root(), date) {
				if err := os.WriteFile(filepath.Join(args[0], name), []byte(page), 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// manualDate is that of SOURCE_DATE_EPOCH, else of the commit that was built, else
// none.
func manualDate() (string, error) {
	const day = "2006-01-02"
	if text, ok := os.LookupEnv("SOURCE_DATE_EPOCH"); ok {
		seconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return "", usageError("SOURCE_DATE_EPOCH %q: use seconds since 1970", text)
		}
		return time.Unix(seconds, 0).UTC().Format(day), nil
	}
	info, _ := debug.ReadBuildInfo()
	for _, s := range info.Settings {
		if at, err := time.Parse(time.RFC3339, s.Value); s.Key == "vcs.time" && err == nil {
			return at.UTC().Format(day), nil
		}
	}
	return "", nil
}

// manual makes the pages, by file name. What the commands say of themselves is no
// Markdown, which cobra's own generator would take it for.
func manual(root *cobra.Command, date string) map[string]string {
	pages := map[string]string{"rpsel.8": manualRoot(root, date), "rpsel.toml.5": manualConfig(root, date)}
	for _, cmd := range manualCommands(root) {
		pages["rpsel-"+cmd.Name()+".8"] = manualCommand(cmd, date)
	}
	return pages
}

// manualCommands are those that have a page.
func manualCommands(root *cobra.Command) (list []*cobra.Command) {
	for _, cmd := range root.Commands() {
		if !cmd.Hidden && cmd.Name() != "help" {
			list = append(list, cmd)
		}
	}
	return list
}

func manualRoot(root *cobra.Command, date string) string {
	p := newPage("rpsel", 8, root.Short, date)
	p.section("SYNOPSIS")
	p.line(synopsis("rpsel COMMAND [flags]"))
	p.section("DESCRIPTION")
	p.text(about)
	p.section("COMMANDS")
	also := []string{"rpsel.toml(5)"}
	for _, cmd := range manualCommands(root) {
		p.item(`\fB`+escape("rpsel-"+cmd.Name())+`\fR(8)`, sentence(cmd.Short))
		also = append(also, "rpsel-"+cmd.Name()+"(8)")
	}
	p.exitStatus()
	p.files(config.Default, "the agent's services", string(loader.DefaultFS)+"/rpsel", "the state of all groups")
	p.seeAlso(append(also, "bpf(2)", "socket(7)"))
	return p.String()
}

func manualCommand(cmd *cobra.Command, date string) string {
	p := newPage("rpsel-"+cmd.Name(), 8, cmd.Short, date)
	p.section("SYNOPSIS")
	p.line(synopsis(cmd.UseLine()))
	p.section("DESCRIPTION")
	description := cmd.Long
	if description == "" {
		description = cmd.Short + "."
	}
	p.text(description)
	cmd.InitDefaultHelpFlag()
	p.section("OPTIONS")
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			p.option(f)
		}
	})
	p.exitStatus()
	if cmd.Name() == "agent" {
		p.section("ENVIRONMENT")
		p.item(`\fBNOTIFY_SOCKET\fR, \fBWATCHDOG_USEC\fR`, "Set by systemd: the agent tells it when it is ready, reloads and ends, and that it is alive.")
		p.files(config.Default, "the services, see rpsel.toml(5)", agent.DefaultDir+"/owner-UID.sock", "where the servers of the user UID register their own sockets")
	}
	p.section("EXAMPLES")
	p.text(cmd.Example)

	// Whom it speaks of.
	also := []string{"rpsel(8)"}
	for _, other := range manualCommands(cmd.Root()) {
		if other != cmd && strings.Contains(cmd.Long, "rpsel "+other.Name()) {
			also = append(also, "rpsel-"+other.Name()+"(8)")
		}
	}
	if cmd.Flags().Lookup("config") != nil {
		also = append(also, "rpsel.toml(5)")
	}
	p.seeAlso(also)
	return p.String()
}

func manualConfig(root *cobra.Command, date string) string {
	p := newPage("rpsel.toml", 5, "Services of the rpsel agent", date)
	p.section("DESCRIPTION")
	p.text("The file " + config.Default + ` tells "rpsel agent" which ports to keep sticky, and how. It is TOML: where metrics
are served, if need be, and a list of services, of which the first that fits a socket counts. The agent reads it again on
SIGHUP; with a mistake in it all stays as it was. "rpsel check --config" looks for
mistakes.

The metrics, and /healthz, come first:

  metrics = "` + config.DefaultMetrics + `"

That is the default, and for this machine alone. "` + config.UnixMetrics + `/PATH" is a unix socket that
its owner and group may use, and "off" is neither.

Each service begins with a line

  [[service]]

and has these keys. All but the port may be left out: each means what the flag of
"rpsel attach" with its name does.`)
	attach, _, err := root.Find([]string{"attach"})
	if err != nil {
		panic(err) // there is one
	}
	p.section("KEYS")
	for _, key := range config.Keys() {
		meaning := serviceKeys[key.Name]
		if f := attach.Flags().Lookup(key.Name); meaning == "" && f != nil {
			_, meaning = pflag.UnquoteUsage(f)
		}
		p.item(`\fB`+escape(key.Name)+`\fR`, sentence(meaning)+" "+sentence(key.Allowed))
	}
	p.section("EXAMPLES")
	p.text(`  [[service]]
  port   = 1194
  policy = "newest"

  [[service]]
  port   = 443
  proto  = "tcp"
  netns  = "all"`)
	p.seeAlso([]string{"rpsel-agent(8)", "rpsel-attach(8)", "rpsel-check(8)"})
	return p.String()
}

// serviceKeys explains the keys of a service that mean something else than the flag of
// the same name, or that have none.
var serviceKeys = map[string]string{
	"port":  "local port of the servers",
	"proto": "protocol (default udp)",
	"addr":  "exact local address of the servers (default: every address)",
	"netns": "network namespace of the servers (default: the agent's own)",
	"force": "pin programs that force SO_REUSEPORT, for BPFProgram= of systemd",
}

// page is a manual page, in man(7).
type page struct {
	strings.Builder
}

func newPage(name string, section int, short, date string) *page {
	version, _ := ownVersion()
	title := map[int]string{5: "File Formats Manual", 8: "System Manager's Manual"}[section]
	p := &page{}
	p.line(fmt.Sprintf(`.TH %s %d "%s" "rpsel %s" "%s"`, escape(strings.ToUpper(name)), section, date, escape(version), title))
	p.section("NAME")
	p.line(escape(name) + ` \- ` + escape(strings.ToLower(short[:1])+short[1:]))
	return p
}

// line writes roff.
func (p *page) line(roff string) { p.WriteString(roff + "\n") }

func (p *page) section(title string) { p.line(".SH " + title) }

// text writes paragraphs, filled, but for lines that are indented.
func (p *page) text(text string) {
	for i, paragraph := range strings.Split(strings.Trim(text, "\n"), "\n\n") {
		if i > 0 {
			p.line(".PP")
		}
		for lines := strings.Split(paragraph, "\n"); len(lines) > 0; {
			literal := strings.HasPrefix(lines[0], "  ")
			end := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "  ") != literal })
			if end < 0 {
				end = len(lines)
			}
			if literal {
				p.line(".RS 4\n.EX")
				for _, line := range lines[:end] {
					p.line(guard(escape(line[2:])))
				}
				p.line(".EE\n.RE")
			} else {
				p.fill(strings.Join(lines[:end], " "))
			}
			lines = lines[end:]
		}
	}
}

// fill writes words in lines that are not too long for a reader of the source.
func (p *page) fill(text string) {
	line := ""
	for _, word := range strings.Fields(escape(text)) {
		if line != "" && len(line)+1+len(word) > 76 {
			p.line(guard(line))
			line = ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	if line != "" {
		p.line(guard(line))
	}
}

// item writes a tag, in roff, and what it is about.
func (p *page) item(tag, text string) {
	p.line(".TP")
	p.line(tag)
	p.fill(text)
}

func (p *page) option(f *pflag.Flag) {
	tag := `\fB` + escape("--"+f.Name) + `\fR`
	if f.Shorthand != "" {
		tag = `\fB` + escape("-"+f.Shorthand) + `\fR, ` + tag
	}
	value, usage := pflag.UnquoteUsage(f)
	switch {
	case value != "" && f.NoOptDefVal != "":
		tag += `[=\fI` + escape(value) + `\fR]`
		usage += " (default " + f.NoOptDefVal + ")"
	case value != "":
		tag += ` \fI` + escape(value) + `\fR`
	}
	p.item(tag, sentence(usage))
}

func (p *page) exitStatus() {
	p.section("EXIT STATUS")
	for _, s := range exitStatuses {
		p.item(fmt.Sprintf(`\fB%d\fR`, s.code), sentence(s.meaning))
	}
}

// files takes pairs of a path and what it is.
func (p *page) files(pairs ...string) {
	p.section("FILES")
	for pair := range slices.Chunk(pairs, 2) {
		p.item(`\fI`+escape(pair[0])+`\fR`, sentence(pair[1]))
	}
}

func (p *page) seeAlso(pages []string) {
	p.section("SEE ALSO")
	for i, name := range pages {
		name, section, _ := strings.Cut(name, "(")
		end := ","
		if i == len(pages)-1 {
			end = ""
		}
		p.line(fmt.Sprintf(`.BR %s (%s%s`, escape(name), section, end))
	}
}

// escape keeps roff from reading anything into a text. A dash is one that can be
// copied into a shell.
func escape(text string) string {
	return strings.NewReplacer(`\`, `\e`, `-`, `\-`).Replace(text)
}

// guard keeps a line from being a request.
func guard(line string) string {
	if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
		return `\&` + line
	}
	return line
}

// sentence makes one of what a flag says of itself.
func sentence(text string) string {
	text = strings.ToUpper(text[:1]) + text[1:]
	if !strings.HasSuffix(text, ".") {
		text += "."
	}
	return text
}

var words = regexp.MustCompile(`[A-Z]{2,}|--?[a-z-]+|\brpsel( [a-z]+)?`)

// synopsis marks a command line: bold is what is written so, italic what stands for
// something.
func synopsis(use string) string {
	use = strings.Replace(use, "[flags]", "[OPTION]...", 1)
	return words.ReplaceAllStringFunc(use, func(word string) string {
		font := `\fB`
		if word[0] >= 'A' && word[0] <= 'Z' {
			font = `\fI`
		}
		return font + escape(word) + `\fR`
	})
}
