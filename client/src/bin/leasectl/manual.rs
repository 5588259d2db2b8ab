//! Prints completions and the manual, which are generated from the options.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Args;
use crate::failure::Failure;
use crate::output::Output;

/// Prints the completions for a shell.
pub(crate) fn completions(shell: Shell, output: &mut Output) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "leasectl", &mut text);
    output.line(String::from_utf8_lossy(&text).trim_end())?;
    Ok(0)
}

/// Prints the manual page of leasectl, or of one of its commands.
pub(crate) fn page(name: Option<&str>, output: &mut Output) -> Result<u8, Failure> {
    let mut command = Args::command();
    command.build();
    if let Some(name) = name {
        let found = command.find_subcommand(name).filter(|command| !command.is_hide_set());
        let Some(found) = found else {
            return Err(Failure::Usage(format!("leasectl has no command {name:?}; see `leasectl --help`")));
        };
        command = found.clone();
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    output.line(String::from_utf8_lossy(&text).trim_end())?;
    Ok(0)
}
