// Command api lists what the public packages export, a line each, as api.txt has it: the
// part of rpsel that Go programs may rely on (docs/versions.md).
package main

import (
	"fmt"
	"go/types"
	"os"
	"slices"
	"strings"

	"golang.org/x/tools/go/packages"
)

const module = "github.com/rpsel/rpsel"

// public are the packages of the API. Types of others belong to it where one of these
// has an alias for them.
var public = []string{module + "/agent", module + "/loader", module + "/sockets"}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: api FILE")
		os.Exit(2)
	}
	lines, err := list()
	if err == nil {
		err = os.WriteFile(os.Args[1], []byte(strings.Join(lines, "\n")+"\n"), 0o644)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "api: %v\n", err)
		os.Exit(1)
	}
}

// list lists the API, sorted.
func list() (lines []string, err error) {
	loaded, err := packages.Load(&packages.Config{Mode: packages.NeedName | packages.NeedTypes | packages.NeedImports | packages.NeedExportFile}, public...)
	if err != nil {
		return nil, err
	}
	for _, p := range loaded {
		if len(p.Errors) > 0 {
			return nil, p.Errors[0]
		}
		for _, name := range p.Types.Scope().Names() {
			if o := p.Types.Scope().Lookup(name); o.Exported() {
				for _, line := range describe(o) {
					lines = append(lines, p.Name+": "+line)
				}
			}
		}
	}
	slices.Sort(lines)
	return lines, nil
}

// describe lists an object, its fields and its methods.
func describe(o types.Object) (lines []string) {
	switch o := o.(type) {
	case *types.Const:
		return []string{fmt.Sprintf("const %s %s = %s", o.Name(), name(o.Type()), o.Val().ExactString())}
	case *types.Var:
		return []string{fmt.Sprintf("var %s %s", o.Name(), name(o.Type()))}
	case *types.Func:
		return []string{"func " + o.Name() + signature(o)}
	}
	t := o.Type()
	if alias, ok := t.(*types.Alias); ok {
		target := types.Unalias(alias).(*types.Named)
		lines = append(lines, fmt.Sprintf("type %s = %s", o.Name(), name(target)))
		if slices.Contains(public, target.Obj().Pkg().Path()) {
			return lines // listed there
		}
		return append(lines, methods(o.Name(), target)...)
	}
	named := t.(*types.Named)
	switch under := named.Underlying().(type) {
	case *types.Struct:
		lines = append(lines, "type "+o.Name()+" struct")
		for f := range under.Fields() {
			if f.Exported() {
				embedded := map[bool]string{true: " (embedded)"}[f.Embedded()]
				lines = append(lines, fmt.Sprintf("type %s struct, %s %s%s", o.Name(), f.Name(), name(f.Type()), embedded))
			}
		}
	default:
		lines = append(lines, fmt.Sprintf("type %s %s", o.Name(), name(under)))
	}
	return append(lines, methods(o.Name(), named)...)
}

func methods(of string, t *types.Named) (lines []string) {
	for m := range t.Methods() {
		if m.Exported() {
			receiver := of
			if _, ok := m.Signature().Recv().Type().(*types.Pointer); ok {
				receiver = "*" + of
			}
			lines = append(lines, fmt.Sprintf("method (%s) %s%s", receiver, m.Name(), signature(m)))
		}
	}
	return lines
}

// signature is a function's parameters and results, without their names: those may change.
func signature(f *types.Func) string {
	s := f.Signature()
	text := name(types.NewSignatureType(nil, nil, nil, nameless(s.Params()), nameless(s.Results()), s.Variadic()))
	return strings.TrimPrefix(text, "func")
}

func nameless(t *types.Tuple) *types.Tuple {
	var vars []*types.Var
	for v := range t.Variables() {
		vars = append(vars, types.NewParam(v.Pos(), v.Pkg(), "", v.Type()))
	}
	return types.NewTuple(vars...)
}

// name writes a type with the names of packages, and the whole path of those of ours that
// are not public.
func name(t types.Type) string {
	return types.TypeString(t, func(p *types.Package) string {
		if strings.HasPrefix(p.Path(), module) && !slices.Contains(public, p.Path()) {
			return p.Path()
		}
		return p.Name()
	})
}
