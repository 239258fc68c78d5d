package main

import (
	"bytes"
	"io"
	"unicode/utf8"
)

// column is a column of a table; numbers are right-aligned.
type column struct {
	title string
	right bool
}

// table aligns columns as wide as their widest cell, two spaces apart.
type table struct {
	columns []column
	indent  string
	rows    [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// write prints the titles, unless header is off, and the rows.
func (t *table) write(w io.Writer, header bool) error {
	rows := t.rows
	if header {
		titles := make([]string, 0, len(t.columns))
		for _, c := range t.columns {
			titles = append(titles, c.title)
		}
		rows = append([][]string{titles}, rows...)
	}
	widths := make([]int, len(t.columns))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var text, line []byte
	for _, row := range rows {
		line = append(line[:0], t.indent...)
		for i, cell := range row {
			pad := widths[i] - utf8.RuneCountInString(cell)
			if i > 0 {
				line = append(line, "  "...)
			}
			if t.columns[i].right {
				line = appendSpaces(line, pad)
			}
			line = append(line, cell...)
			if !t.columns[i].right {
				line = appendSpaces(line, pad)
			}
		}
		text = append(append(text, bytes.TrimRight(line, " ")...), '\n')
	}
	_, err := w.Write(text)
	return err
}

func appendSpaces(line []byte, n int) []byte {
	for range n {
		line = append(line, ' ')
	}
	return line
}
