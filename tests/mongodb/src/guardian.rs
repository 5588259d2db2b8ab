//! The life of a server process: it ends, and its folder goes, when this process ends for whatever reason.
//!
//! A destructor would not do: libtest runs none for statics, and nothing runs any after SIGKILL. So the server runs
//! under a small shell that waits for the end of its standard input. That is a pipe of which only this process holds
//! the other end (Rust opens it close-on-exec), so the system itself closes it, whatever happens here.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// Starts "$@" and says its id; at the end of standard input, or when the server ends, all is over.
/// KILL also ends a server that is stopped.
const SCRIPT: &str = r#"
folder=$1; shift
"$@" </dev/null >"$folder/output" 2>&1 &
server=$!
echo "$server"
read -r _
kill -KILL "$server" 2>/dev/null
wait "$server" 2>/dev/null
[ -e "$folder/keep" ] || rm -rf "$folder"
"#;

/// A server and the shell that watches over it.
#[derive(Debug)]
pub(crate) struct Guarded {
    shell: Child,
    server: Pid,
}

impl Guarded {
    /// Starts `command` with its files in `folder`, which is removed in the end.
    pub(crate) fn start(folder: &Path, command: &mut Command) -> Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "guardian"])
            .arg(folder)
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C on a terminal is for this process; the order of ending is its own.
            .process_group(0)
            .spawn()
            .context("cannot start sh")?;
        let mut line = String::new();
        let output = shell.stdout.take().context("the shell's output")?;
        BufReader::new(output).read_line(&mut line)?;
        let server =
            line.trim().parse().ok().and_then(Pid::from_raw).context("the server has no process id")?;
        Ok(Self { shell, server })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.server.as_raw_nonzero().get().unsigned_abs()
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.server, signal).context("cannot signal the server")
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // Waits for the folder to be gone; there is nobody to tell if that fails.
        drop(self.shell.wait());
    }
}
