//! The guardian of a server process. When the process that started the server ends, for whatever
//! reason, the guardian kills the server and removes its folder.
//!
//! A destructor is not enough: libtest does not run the destructors of statics, and none run after
//! SIGKILL. So the server runs under a small shell, which reads orders from its standard input.
//! That input is a pipe whose other end only the starting process holds (Rust opens it
//! close-on-exec). When that process ends, the system closes the pipe, and the shell cleans up.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// The shell script of the guardian. It answers each order with the process id of the server, or
/// with an empty line if no server runs. At the end of its input it cleans up.
///
/// - No signal may end the shell before it has cleaned up. The system sends HUP to an orphaned
///   process group with a stopped member, such as a paused server.
/// - KILL ends even a stopped server.
/// - A shell may notice the end of the server only when `jobs` runs. Until then, `kill -0` succeeds
///   for the dead process.
const SCRIPT: &str = r#"
trap '' HUP INT PIPE TERM
folder=$1; shift
server=
end() {
    [ -z "$server" ] || { kill -KILL "$server"; wait "$server"; }
    server=
}
while read -r order; do
    case $order in
        start) end; "$@" </dev/null >"$folder/output" 2>&1 & server=$! ;;
        end) end ;;
        poll) jobs >/dev/null; kill -0 "$server" || server= ;;
    esac
    echo "$server"
done
end
rm -rf "$folder"
"#;

/// A folder, a server that runs in it, and the shell that guards both.
#[derive(Debug)]
pub struct Guardian {
    shell: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    server: Option<Pid>,
}

impl Guardian {
    /// Guards `folder`, and removes it at the end. [`Self::start`] runs the program and the
    /// arguments of `command`, and ignores its other settings. The server's output goes to the file
    /// `output` in the folder.
    ///
    /// # Errors
    /// If there is no shell.
    pub fn new(folder: &Path, command: &Command) -> Result<Self> {
        let mut shell = Command::new("sh")
            .args(["-c", SCRIPT, "guardian"])
            .arg(folder)
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // The shell itself would print messages, such as that a job was killed.
            .stderr(Stdio::null())
            // In its own process group the shell does not receive Ctrl-C. Only this process decides
            // when the server ends.
            .process_group(0)
            .spawn()
            .context("cannot start sh")?;
        let orders = Some(shell.stdin.take().context("the shell has no input")?);
        let answers = BufReader::new(shell.stdout.take().context("the shell has no output")?);
        Ok(Self { shell, orders, answers, server: None })
    }

    /// Starts the server. A server that is still running is killed first.
    ///
    /// # Errors
    /// If the shell has been killed.
    pub fn start(&mut self) -> Result<()> {
        self.order("start")
    }

    /// Kills the server, waits for the end of its process, and keeps its folder.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn kill(&mut self) -> Result<()> {
        self.order("end")
    }

    /// Returns whether the server is still running.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn is_running(&mut self) -> Result<bool> {
        self.order("poll")?;
        Ok(self.server.is_some())
    }

    /// Returns the id of the server's process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.map(|server| server.as_raw_nonzero().get().unsigned_abs())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let server = self.server.context("the server has been killed")?;
        kill_process(server, signal).context("cannot signal the server")
    }

    fn order(&mut self, order: &str) -> Result<()> {
        let orders = self.orders.as_mut().context("the guardian accepts no more orders")?;
        writeln!(orders, "{order}").context("the server's guardian has been killed")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        self.server = answer.trim().parse().ok().and_then(Pid::from_raw);
        Ok(())
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.orders.take());
        // The shell removes the folder before it ends. A failure cannot be reported from here.
        drop(self.shell.wait());
    }
}
