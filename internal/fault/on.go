//go:build faults

package fault

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
)

// Point marks a step that has been done. The process ends as by kill -9 if it is
// the chosen one.
func Point(name string) {
	path := os.Getenv(Log)
	if path == "" {
		return
	}
	_, file, line, _ := runtime.Caller(1)
	n := passed(path, fmt.Sprintf("%s (%s/%s:%d)\n", name, filepath.Base(filepath.Dir(file)), filepath.Base(file), line))
	if at, err := strconv.Atoi(os.Getenv(KillAt)); err == nil && at == n {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // until the signal is there
	}
}

// passed adds a line to a file that several processes may write, and returns how
// many it has.
func passed(path, line string) int {
	log, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		panic(err)
	}
	defer log.Close()
	if err := syscall.Flock(int(log.Fd()), syscall.LOCK_EX); err != nil {
		panic(err)
	}
	if _, err := log.WriteString(line); err != nil {
		panic(err)
	}
	if _, err := log.Seek(0, io.SeekStart); err != nil {
		panic(err)
	}
	text, err := io.ReadAll(log)
	if err != nil {
		panic(err)
	}
	return bytes.Count(text, []byte("\n"))
}
