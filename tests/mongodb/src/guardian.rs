//! The life of a server process: it ends, and its folder goes, when this process ends for whatever reason.
//!
//! A destructor would not do: libtest runs none for statics, and nothing runs any after SIGKILL. So the server runs
//! under a small shell that takes its orders from its standard input. That is a pipe of which only this process holds
//! the other end (Rust opens it close-on-exec), so the system itself closes it, whatever happens here.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// Answers each order with the id of the server that then runs, or with an empty line; without more orders all is over.
///
/// - No signal may end the shell before it has cleaned up. HUP does come: from the system, when this process ends
///   while the server is stopped and their process group is left without a parent in the session.
/// - KILL also ends a server that is stopped.
/// - A shell need not notice that the server has ended by itself before `jobs` asks; until it does, `kill -0` finds
///   the dead process.
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
        look) jobs >/dev/null; kill -0 "$server" || server= ;;
    esac
    echo "$server"
done
end
rm -rf "$folder"
"#;

/// A folder, the server that may run in it, and the shell that watches over both.
#[derive(Debug)]
pub struct Guardian {
    shell: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    server: Option<Pid>,
}

impl Guardian {
    /// Watches over `folder`, which is removed in the end; `command` is what [`Self::start`] runs, of which the program
    /// and the arguments count. What it says goes to `output` in the folder.
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
            // The shell's own remarks, such as that a job was killed.
            .stderr(Stdio::null())
            // Ctrl-C on a terminal is for this process; the order of ending is its own.
            .process_group(0)
            .spawn()
            .context("cannot start sh")?;
        let orders = Some(shell.stdin.take().context("the shell has no input")?);
        let answers = BufReader::new(shell.stdout.take().context("the shell has no output")?);
        Ok(Self { shell, orders, answers, server: None })
    }

    /// Starts the server; ends the one that runs, if any.
    ///
    /// # Errors
    /// If somebody else ended the shell, as with every order.
    pub fn start(&mut self) -> Result<()> {
        self.order("start")
    }

    /// Ends the server as a crash would; the folder stays. On return the process is gone.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn end(&mut self) -> Result<()> {
        self.order("end")
    }

    /// Whether the server has not ended by itself.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn is_running(&mut self) -> Result<bool> {
        self.order("look")?;
        Ok(self.server.is_some())
    }

    /// The server's process, while there is one.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.server.map(|server| server.as_raw_nonzero().get().unsigned_abs())
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let server = self.server.context("the server has been killed")?;
        kill_process(server, signal).context("cannot signal the server")
    }

    fn order(&mut self, order: &str) -> Result<()> {
        let orders = self.orders.as_mut().context("the guardian takes no more orders")?;
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
        // Waits for the folder to be gone; there is nobody to tell if that fails.
        drop(self.shell.wait());
    }
}
