//! A command at a terminal: it reads the keyboard, can be stopped and continued, and the wait is
//! shown.

use std::path::Path;
use std::process::{Command, Stdio};

use rstest::rstest;

use crate::support::{Daemon, Ended, Process, leasectl};

/// A script that plays a person at a terminal. Its arguments are the number of pairs, the pairs,
/// and a command. It runs the command at a terminal, and ends with the command's exit code. For
/// each pair it waits until the first text is on the screen, and then types the second. `^C` and
/// `^Z` stand for these keys. A second text that begins with `!` is not typed, but run as a shell
/// command.
const PERSON: &str = r#"
import fcntl, os, pty, re, select, signal, struct, subprocess, sys, termios, time
count = int(sys.argv[1])
script = [(sys.argv[2 + 2 * i], sys.argv[3 + 2 * i]) for i in range(count)]
child, screen = pty.fork()
if child == 0:
    # Signals that the test run was started to ignore must have their default effect here.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    os.execvp(sys.argv[2 + 2 * count], sys.argv[2 + 2 * count:])
fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
seen, everything, end = b'', b'', time.monotonic() + 40
while True:
    while script and re.search(script[0][0].encode(), seen):
        seen, typed = b'', script.pop(0)[1]
        if typed.startswith('!'):
            subprocess.run(typed[1:], shell=True, check=True, stdout=subprocess.DEVNULL)
        else:
            os.write(screen, typed.replace('^C', '\x03').replace('^Z', '\x1a').encode())
    if time.monotonic() > end:
        print('WAITED IN VAIN FOR', script, 'AFTER', everything)
        sys.exit(99)
    try:
        if not select.select([screen], [], [], 1)[0]:
            continue
        read = os.read(screen, 4096)
    except OSError:
        break
    if not read:
        break
    seen += read
    everything += read
print(everything.decode(errors='replace'))
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
# If a signal ended the command, the exit code is 128 plus its number, as in a shell.
sys.exit(98 if script else code if code >= 0 else 128 - code)
"#;

/// Runs `command` at a terminal and plays `script` there: pairs of a regular expression to wait for
/// and a text to type. Returns everything that the screen showed.
fn at_terminal(daemon: &Daemon, script: &[(&str, &str)], command: &[&str]) -> Ended {
    let mut person = Command::new("python3");
    // The settings of leasectl are removed from the environment, as in every test.
    let plain = leasectl(&[]);
    for (name, _) in plain.get_envs() {
        person.env_remove(name);
    }
    person.args(["-c", PERSON, &script.len().to_string()]);
    person.args(script.iter().flat_map(|(seen, typed)| [seen, typed])).args(command);
    person.env("LEASED_ENDPOINT", daemon.url()).env("TERM", "xterm");
    person.env("PATH", path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Process::spawn(&mut person).end()
}

/// Returns a search path on which leasectl is found.
fn path() -> String {
    let folder = Path::new(env!("CARGO_BIN_EXE_leasectl")).parent().unwrap();
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
}

#[test]
fn a_command_reads_the_keyboard_and_the_terminal_is_given_back() {
    let daemon = Daemon::start();
    // Only leasectl can give the terminal back here, since a shell without job control just goes on
    // reading.
    let script =
        "leasectl run a/key -- sh -c 'echo ask; read x; echo got:$x:'; echo and; read y; echo then:$y:";
    let ended = at_terminal(&daemon, &[("ask", "one\n"), ("and", "two\n")], &["sh", "-c", script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("got:one:") && ended.stdout.contains("then:two:"), "{ended:?}");
}

#[test]
fn a_command_in_a_pipe_can_read_the_keyboard() {
    let daemon = Daemon::start();
    let script = "leasectl run a/key -- sh -c 'echo ask; read x; echo got:$x:' | cat";
    let ended = at_terminal(&daemon, &[("ask", "one\n")], &["sh", "-c", script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("got:one:"), "{ended:?}");
}

#[test]
fn ctrl_c_reaches_the_command() {
    let daemon = Daemon::start();
    let script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done";
    let command = ["leasectl", "run", "a/key", "--", "sh", "-c", script];
    let ended = at_terminal(&daemon, &[("ready", "^C")], &command);
    assert_eq!(ended.code, Some(5), "{ended:?}");
    assert_eq!(ended.stdout.matches("caught").count(), 1, "{ended:?}");
}

/// The terminal sends the signal only to the command. leasectl then ends by the same signal, so
/// that the script around it ends.
#[test]
fn ctrl_c_that_ends_the_command_ends_the_script_around_it() {
    let daemon = Daemon::start();
    let script = "leasectl run a/key -- sh -c 'echo ready; exec sleep 600'; echo ne''xt";
    for shell in ["sh", "bash"] {
        let ended = at_terminal(&daemon, &[("ready", "^C")], &[shell, "-c", script]);
        assert_eq!(ended.code, Some(130), "{ended:?}");
        assert!(!ended.stdout.contains("next"), "{ended:?}");
        assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "released");
    }
}

/// A command without the terminal is in the background, so the terminal sends the signal to
/// leasectl, which passes it on.
#[rstest]
fn ctrl_c_ends_the_script_even_if_the_command_has_no_terminal(
    #[values("> /dev/null", "< /dev/null", "| cat")] redirected: &str,
) {
    let daemon = Daemon::start();
    let run = "leasectl run a/key -- sh -c 'echo ready > /dev/tty; exec sleep 600'";
    let script = format!("for round in 1 2; do {run} {redirected}; echo ne''xt; done");
    let ended = at_terminal(&daemon, &[("ready", "^C")], &["bash", "-c", &script]);
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(!ended.stdout.contains("next"), "{ended:?}");
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "released");
}

#[test]
fn ctrl_c_that_ends_the_wait_ends_the_script_around_it() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key", "--owner=the-holder"]);
    let script = "leasectl run a/key -- true; echo ne''xt";
    let ended = at_terminal(&daemon, &[("held by the-holder", "^C")], &["bash", "-c", script]);
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(!ended.stdout.contains("next"), "{ended:?}");
}

#[test]
fn a_shell_stops_and_continues_leasectl_and_its_command() {
    let daemon = Daemon::start();
    let run = "leasectl run a/key -- sh -c 'echo re''ady; read x; echo got:$x:; exit 6'\n";
    let script = [
        ("[#$] ", run),
        ("ready", "^Z"),
        ("Stopped", "fg\n"),
        ("leasectl run", "one\n"),
        ("got:one:", "echo code $?\n"),
        ("code 6", "exit 0\n"),
    ];
    let ended = at_terminal(&daemon, &script, &["bash", "--norc", "--noprofile", "-i"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn a_shell_stops_and_continues_leasectl_under_leasectl() {
    let daemon = Daemon::start();
    let inner = "leasectl run b/key -- sh -c 'echo re''ady; read x; echo go''es on; exit 6'";
    let run = format!("leasectl run a/key -- {inner}\n");
    let script = [
        ("[#$] ", run.as_str()),
        ("ready", "^Z"),
        ("Stopped", "fg\n"),
        ("leasectl run", "\n"),
        ("goes on", "echo code $?\n"),
        ("code 6", "exit 0\n"),
    ];
    let ended = at_terminal(&daemon, &script, &["bash", "--norc", "--noprofile", "-i"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[rstest]
fn a_command_that_stops_itself_is_a_stopped_job_of_the_shell(
    #[values("", "leasectl run b/key -- ")] nested: &str,
) {
    let daemon = Daemon::start();
    let run = format!("leasectl run a/key -- {nested}sh -c 'kill -STOP $$; echo go''es on; exit 6'\n");
    let script =
        [("[#$] ", run.as_str()), ("Stopped", "fg\n"), ("goes on", "echo code $?\n"), ("code 6", "exit 0\n")];
    let ended = at_terminal(&daemon, &script, &["bash", "--norc", "--noprofile", "-i"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

/// An interactive shell makes a new process group for itself, and is in it when it is suspended.
#[test]
fn a_shell_under_leasectl_can_be_suspended() {
    let daemon = Daemon::start();
    let shell = "leasectl run a/key -- bash --norc --noprofile -i\n";
    let script = [
        ("[#$] ", shell),
        ("[#$] ", "suspend\n"),
        ("Stopped", "fg\n"),
        ("leasectl run", "echo in''ner; exit 6\n"),
        ("inner", "echo code $?\n"),
        ("code 6", "exit 0\n"),
    ];
    let ended = at_terminal(&daemon, &script, &["bash", "--norc", "--noprofile", "-i"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

/// The system ignores Ctrl-Z for a process group that no shell could continue, and leasectl does so
/// for its command.
#[rstest]
fn ctrl_z_does_nothing_under_a_shell_without_job_control(
    #[values("sh", "bash")] shell: &str,
    #[values("", "2> /dev/null", "| cat")] redirected: &str,
) {
    let daemon = Daemon::start();
    let run = "leasectl run a/key -- sh -c 'echo ready > /dev/tty; read x; echo got:$x:'";
    let script = format!("{run} {redirected}; echo ne''xt");
    let ended = at_terminal(&daemon, &[("ready", "^Zone\n")], &[shell, "-c", &script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("got:one:") && ended.stdout.contains("next"), "{ended:?}");
}

/// timeout(1) runs leasectl in a background process group, and ignores the signals that stop this
/// group when leasectl uses the terminal.
#[test]
fn a_program_around_leasectl_that_ignores_stop_signals_continues() {
    let daemon = Daemon::start();
    let folder = tempfile::tempdir().unwrap();
    let [outer, inner] = ["timeout", "leasectl"].map(|name| folder.path().join(name).display().to_string());
    let command = format!("leasectl run a/key -- sh -c 'echo $PPID > {inner}; echo ready; read x'");
    let script = format!("sh -c 'echo $$ > {outer}; exec timeout 600 \"$@\"' sh {command}; echo code $?");
    let stopped = format!("ps -o state= -p $(cat {inner}) | grep -q T");
    let end = format!("!timeout 30 sh -c 'until {stopped}; do sleep 0.02; done'; kill -TERM $(cat {outer})");
    let ended = at_terminal(&daemon, &[("ready", &end)], &["sh", "-c", &script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("code 143"), "{ended:?}");
}

/// A signal from the terminal is also meant for the script. A signal that the command sends itself
/// is not.
#[test]
fn a_command_that_interrupts_itself_does_not_end_the_script_around_it() {
    let daemon = Daemon::start();
    for signal in ["INT", "QUIT"] {
        let script = format!("leasectl run a/key -- sh -c 'kill -{signal} $$'; echo code $?");
        let ended = at_terminal(&daemon, &[], &["bash", "-c", &script]);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(ended.stdout.contains("code 13"), "{ended:?}");
    }
}

/// In another PID namespace leasectl could not take the terminal back, so it does not give the
/// terminal to the command.
#[test]
fn a_command_runs_on_a_terminal_within_another_pid_namespace() {
    let daemon = Daemon::start();
    let run = "leasectl run a/key -- sh -c 'echo runs; exit 6'";
    let reads = "leasectl run a/key -- cat";
    let script =
        format!("unshare -Urpf --mount-proc sh -c '{}'; echo code $?; {reads}", run.replace('\'', "\""));
    let ended = at_terminal(&daemon, &[("code", "one\n"), ("one\\s+one", "\x04")], &["sh", "-c", &script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("runs") && ended.stdout.contains("code 6"), "{ended:?}");
}

#[test]
fn a_command_that_is_stopped_for_too_long_loses_its_lease() {
    let daemon = Daemon::start();
    // The command starts no process. A shell that is stopped during vfork may never be reported as
    // stopped.
    let run = "leasectl run a/key --ttl 4s -- sh -c 'echo re''ady; read x'\n";
    let next = "leasectl run a/key -- echo ne''xt\n";
    let script = [
        ("[#$] ", run),
        ("ready", "^Z"),
        // This leasectl waits until the lease of the stopped one has expired.
        ("Stopped", next),
        ("next", "fg\n"),
        ("leasectl: ", "echo code $?\n"),
        ("code 73", "exit 0\n"),
    ];
    let ended = at_terminal(&daemon, &script, &["bash", "--norc", "--noprofile", "-i"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn a_wait_is_shown_with_the_holder_the_position_and_the_time() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key", "--owner=the-holder"]);
    let command = ["leasectl", "run", "a/key", "--", "true"];
    let shown = "a/key: held by the-holder, position 1 of 1 in the queue; giving up in 59m";
    let ended = at_terminal(&daemon, &[(shown, "^C")], &command);
    assert_eq!(ended.code, Some(130), "{ended:?}");
}

#[test]
fn a_wait_without_a_limit_shows_no_time_at_which_it_gives_up() {
    let daemon = Daemon::start();
    let held = daemon.json(&["acquire", "a/key", "--owner=the-holder"]);
    let release = format!("!leasectl release a/key {}", held["lease_id"].as_str().unwrap());
    let command = ["leasectl", "run", "a/key", "--wait", "forever", "--", "echo", "runs"];
    let shown = "held by the-holder, position 1 of 1 in the queue";
    let ended = at_terminal(&daemon, &[(shown, release.as_str())], &command);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.stdout.contains("giving up") && ended.stdout.contains("runs"), "{ended:?}");
}

/// The status line of a wait is erased when the wait is over, even if its text is wider than the
/// terminal.
#[test]
fn a_wait_leaves_nothing_on_the_screen() {
    let daemon = Daemon::start();
    let key = "k".repeat(300);
    let held = daemon.json(&["acquire", &key, "--owner=the-holder"]);
    let release = format!("!leasectl release {key} {}", held["lease_id"].as_str().unwrap());
    let command = ["leasectl", "run", &key, "--", "echo", "runs"];
    let ended = at_terminal(&daemon, &[("waiting for kkk", release.as_str())], &command);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.stdout.contains("\x1b[1A"), "the status line has wrapped: {ended:?}");
    let after = ended.stdout.rsplit("\x1b[2K").next().unwrap();
    assert_eq!(after.trim(), "runs", "{ended:?}");
}
