//! The command and its process group: starts and signals them, stops and continues them with the
//! terminal, and notices their end. The lease appears here only as a deadline.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, waitpid};

use crate::failure::{Failure, NOT_EXECUTABLE, NOT_FOUND, of_signal};
use crate::guardian::{Guardian, KEYS};
use crate::orphans;
use crate::processes::group_of;
use crate::terminal::Terminal;

/// A started command.
pub(crate) struct Job {
    guardian: Guardian,
    command: Pid,
    terminal: Option<Terminal>,
    /// Whether the group has the terminal, or had it until it was stopped.
    has_terminal: bool,
    /// Whether the command was sent SIGHUP, because it asked for a terminal that it cannot have.
    is_hung_up: bool,
}

/// What has happened to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The command has ended.
    Ended(Exit),
    /// The command has been stopped.
    Stopped(i32),
    /// The guardian has ended.
    Unguarded,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The command exited with this code.
    Code(u8),
    /// The signal with this number ended the command.
    Signal(i32),
}

impl Exit {
    /// The exit code, as shells show it.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(number) => of_signal(number),
        }
    }

    /// The signal that ended the command, if that signal has a name.
    pub(crate) fn signal(self) -> Option<Signal> {
        match self {
            Self::Code(_) => None,
            Self::Signal(number) => Signal::from_named_raw(number),
        }
    }

    /// The signal that ended the command, if a terminal key sends it.
    pub(crate) fn by_key(self) -> Option<Signal> {
        self.signal().filter(|signal| KEYS.contains(signal))
    }
}

impl Job {
    /// Starts a command, which is killed at `deadline` unless [`until`](Self::until) moves the
    /// deadline.
    pub(crate) fn start(
        command: &[OsString],
        environment: [(&str, String); 2],
        deadline: u64,
    ) -> Result<Self, Failure> {
        let [program, arguments @ ..] = command else {
            return Err(Failure::Usage("there is no command to run; name it after `--`".to_owned()));
        };
        let mut guardian = Guardian::start()
            .map_err(|error| Failure::System(format!("cannot start the guardian process: {error}")))?;
        guardian.until(deadline);
        let group = guardian.group();
        let terminal = Terminal::open();
        let gives = |terminal: &Terminal| Terminal::is_for_command() && terminal.give(group);
        let has_terminal = terminal.as_ref().is_some_and(gives);
        let mut prepared = Command::new(program);
        prepared.args(arguments).envs(environment).process_group(group.as_raw_nonzero().get());
        let started = prepared.spawn().and_then(|child| {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            pid.ok_or_else(|| ErrorKind::InvalidData.into())
        });
        match started {
            Ok(command) => Ok(Self { guardian, command, terminal, has_terminal, is_hung_up: false }),
            Err(error) => {
                if let Some(terminal) = &terminal {
                    terminal.take_back(group);
                }
                guardian.dismiss();
                Err(cannot_start(program, &error))
            }
        }
    }

    /// Sets when the guardian kills the group, whatever happens to leasectl.
    pub(crate) fn until(&mut self, deadline: u64) {
        self.guardian.until(deadline);
    }

    /// When the group is killed, unless [`until`](Self::until) moves the deadline.
    pub(crate) fn deadline(&self) -> u64 {
        self.guardian.deadline()
    }

    /// Returns the next event of the command, if there is one. To be called after each SIGCHLD,
    /// until it returns `None`.
    pub(crate) fn poll(&mut self) -> io::Result<Option<Event>> {
        self.reap();
        let options = WaitOptions::NOHANG | WaitOptions::UNTRACED;
        if let Some((_, status)) = waitpid(Some(self.command), options)? {
            if let Some(code) = status.exit_status() {
                return Ok(Some(Event::Ended(Exit::Code(u8::try_from(code).unwrap_or(u8::MAX)))));
            }
            if let Some(number) = status.terminating_signal() {
                return Ok(Some(Event::Ended(Exit::Signal(number))));
            }
            return Ok(status.stopping_signal().map(Event::Stopped));
        }
        Ok(self.guardian.has_ended().then_some(Event::Unguarded))
    }

    /// Signals the whole group.
    pub(crate) fn signal(&self, signal: Signal) {
        // Fails if the group is empty.
        let _ = kill_process_group(self.guardian.group(), signal);
    }

    /// Reacts to a stop of the command. If the command asked for the terminal and leasectl has it,
    /// the command gets it. Otherwise leasectl stops as well, as a job of the shell around it, and
    /// passes on SIGCONT when it is continued.
    pub(crate) fn stopped(&mut self, signal: i32) {
        let is = |one: Signal| one.as_raw() == signal;
        if is(Signal::STOP) {
            // A SIGSTOP to the whole group has stopped the guardian, too.
            self.guardian.go_on();
        }
        let Some(terminal) = &self.terminal else { return };
        let asks = [Signal::TTIN, Signal::TTOU].into_iter().find(|one| is(*one));
        if asks.is_some() && terminal.is_ours() {
            self.has_terminal = true;
            return self.resume();
        }
        if terminal.stop(asks.unwrap_or(Signal::TSTP)) || is(Signal::STOP) {
            return;
        }
        // There is no shell that could continue the command.
        if asks.is_none() {
            self.resume();
        } else if !std::mem::replace(&mut self.is_hung_up, true) {
            // The command asked for a terminal that it cannot have. If it ignores SIGHUP and asks
            // again, it stays stopped.
            self.signal(Signal::HUP);
            self.signal(Signal::CONT);
        }
    }

    /// Continues the command after a stop. It is in the foreground again if it was before, and if
    /// leasectl is in the foreground.
    pub(crate) fn resume(&self) {
        // The command may have left the group: an interactive shell makes a new one for itself.
        let group = group_of(Some(self.command)).unwrap_or(self.guardian.group());
        if let Some(terminal) = self.terminal.as_ref().filter(|_| self.has_terminal) {
            terminal.give(group);
        }
        self.signal(Signal::CONT);
        if group != self.guardian.group() {
            let _ = kill_process_group(group, Signal::CONT);
        }
    }

    /// Leaves the group after the command has ended under its lease. Processes that the command
    /// left running in the group live on. Returns whether the group had the terminal.
    pub(crate) fn leave(&mut self) -> bool {
        let had_terminal = self.take_terminal();
        self.guardian.dismiss();
        had_terminal
    }

    /// Whether the group was sent `signal`, INT or QUIT. `None` until the guardian has ended, after
    /// [`leave`](Self::leave).
    pub(crate) fn group_received(&self, signal: Signal) -> Option<bool> {
        self.guardian.received(signal)
    }

    /// Has the guardian kill what is left of the group at the deadline, unless the group is empty
    /// before. For a command that has ended and whose lease cannot be relied on.
    pub(crate) fn clear(&mut self) {
        self.take_terminal();
        self.guardian.clear();
    }

    /// Whether the group is empty, after [`clear`](Self::clear).
    pub(crate) fn is_clear(&self) -> bool {
        // A process that has ended counts as a member of its group until it is waited for.
        self.reap();
        self.guardian.has_ended()
    }

    fn reap(&self) {
        orphans::reap(&[self.command, self.guardian.group()]);
    }

    /// Takes the terminal back, and returns whether the group had it.
    fn take_terminal(&self) -> bool {
        self.terminal.as_ref().is_some_and(|terminal| terminal.take_back(self.guardian.group()))
    }
}

fn cannot_start(program: &OsString, error: &io::Error) -> Failure {
    let program = program.display();
    match error.kind() {
        // The system could not make a process, or lacked the memory for it.
        ErrorKind::WouldBlock | ErrorKind::OutOfMemory => {
            Failure::System(format!("cannot start {program}: {error}"))
        }
        ErrorKind::NotFound => Failure::Command(
            NOT_FOUND,
            format!(
                "{program} is not found; give its path, put its folder on the PATH, or check the interpreter that its \
                 first line names"
            ),
        ),
        _ => Failure::Command(NOT_EXECUTABLE, format!("{program} cannot be run: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn a_lack_of_processes_or_memory_is_not_the_fault_of_the_command() {
        let failure = |errno: Errno| cannot_start(&"program".into(), &errno.into());
        for errno in [Errno::AGAIN, Errno::NOMEM] {
            assert!(matches!(failure(errno), Failure::System(_)), "{errno}");
        }
        assert!(matches!(failure(Errno::ACCESS), Failure::Command(NOT_EXECUTABLE, _)));
        assert!(matches!(failure(Errno::NOENT), Failure::Command(NOT_FOUND, _)));
    }
}
