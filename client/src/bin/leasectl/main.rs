//! leasectl: leases for people and scripts. Contents page, and the exit code.

/// What was typed.
mod args;
/// How it ends.
mod failure;

// Commands.

/// The calls that answer at once.
mod calls;
/// The manual and completions.
mod manual;
/// A command that runs for as long as a lease is held.
mod run;
/// A line per change.
mod watch;

// What they are made of.

/// Room for the files that it opens.
mod files;
/// Keys and changes as JSON.
mod json;
/// What is shown: for people, and as JSON.
mod output;
/// The owner's label when none is given.
mod owner;
/// Keys and changes for people.
mod table;
/// A lease, waited for.
mod wanted;

// What `run` is made of.

/// The end of a command that outlives its lease, come what may.
mod guardian;
/// The command and its process group.
mod job;
/// What the first process of a container adopts.
mod orphans;
/// Groups, sessions and parents of processes.
mod processes;
/// Signals that are passed on, and death by one.
mod signals;
/// Whose the terminal is.
mod terminal;
/// When a command must end.
mod times;

use std::process::ExitCode;

use leased_client::Client;
use tokio::runtime::Builder;

use args::{Args, Command};
use failure::Failure;
use output::Output;

fn main() -> ExitCode {
    // The other role of this program, which `run` starts. It is to be quick, and has no options.
    if std::env::args_os().next().is_some_and(|role| role == guardian::ROLE) {
        return guardian::main();
    }
    let args = match Args::read() {
        Ok(args) => args,
        Err(error) => return failure::usage(&error),
    };
    let format = args.output;
    if let Err(failure) = files::make_sure_of_room() {
        return failure.report(format);
    }
    // One thread: the system ends no child of a thread that is still there, and a short command starts sooner.
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::from(error).report(format),
    };
    match runtime.block_on(execute(args)) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => failure.report(format),
    }
}

async fn execute(args: Args) -> Result<u8, Failure> {
    let Args { connection, output, command } = args;
    let mut output = Output::new(output);
    if let Command::Completions { shell } = command {
        return manual::completions(shell, &mut output);
    }
    if let Command::Man { command } = command {
        return manual::page(command.as_deref(), &mut output);
    }
    let client = connection.client()?;
    let done = perform(&client, command, &mut output).await;
    match done {
        Err(Failure::Client(error)) => Err(failure::explain(error, connection.endpoints()).await),
        done => done,
    }
}

async fn perform(client: &Client, command: Command, output: &mut Output) -> Result<u8, Failure> {
    match command {
        Command::Run { wish, command } => run::run(client, wish, &command).await,
        Command::Acquire { wish } => calls::acquire(client, wish, output).await,
        Command::Touch(lease) => calls::touch(client, lease, output).await,
        Command::Release(lease) => calls::release(client, lease, output).await,
        Command::Get { key } => calls::get(client, &key, output).await,
        Command::Ls { prefix, all } => calls::list(client, prefix, all, output).await,
        Command::Watch { prefix } => watch::watch(client, prefix, output).await,
        Command::Revoke { key, token, reason } => calls::revoke(client, &key, token, &reason, output).await,
        Command::Completions { .. } | Command::Man { .. } => Ok(0),
    }
}
