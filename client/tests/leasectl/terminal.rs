//! A command at a terminal: it has the keys, can be stopped and continued, and the wait is shown.

use std::path::Path;
use std::process::{Command, Stdio};

use rstest::rstest;

use crate::support::{Daemon, Ended, Process, leasectl};

/// Plays a person at a terminal: takes pairs of what to wait for on the screen and what to type then, and runs the rest
/// of its arguments there. Its exit code is theirs; `^C` and `^Z` stand for those keys, and what begins with `!` is not typed but
/// run elsewhere.
const PERSON: &str = r#"
import fcntl, os, pty, re, select, signal, struct, subprocess, sys, termios, time
count = int(sys.argv[1])
script = [(sys.argv[2 + 2 * i], sys.argv[3 + 2 * i]) for i in range(count)]
child, screen = pty.fork()
if child == 0:
    # What the test run was started to ignore is not for them.
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
# As shells show a death by a signal.
sys.exit(98 if script else code if code >= 0 else 128 - code)
"#;

/// What a person at a terminal sees, who runs `command` and types each second text when each first one (a regular
/// expression) has been seen.
fn at_terminal(daemon: &Daemon, script: &[(&str, &str)], command: &[&str]) -> Ended {
    let mut person = Command::new("python3");
    // The environment that a test has.
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

/// With leasectl on it.
fn path() -> String {
    let folder = Path::new(env!("CARGO_BIN_EXE_leasectl")).parent().unwrap();
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap())
}

#[test]
fn a_command_reads_the_keys_and_the_terminal_comes_back() {
    let daemon = Daemon::start();
    // Nobody but leasectl gives it back here: a shell without job control goes on reading.
    let script =
        "leasectl run a/key -- sh -c 'echo ask; read x; echo got:$x:'; echo and; read y; echo then:$y:";
    let ended = at_terminal(&daemon, &[("ask", "one\n"), ("and", "two\n")], &["sh", "-c", script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("got:one:") && ended.stdout.contains("then:two:"), "{ended:?}");
}

#[test]
fn a_command_that_asks_for_the_keys_from_within_a_pipe_gets_them() {
    let daemon = Daemon::start();
    let script = "leasectl run a/key -- sh -c 'echo ask; read x; echo got:$x:' | cat";
    let ended = at_terminal(&daemon, &[("ask", "one\n")], &["sh", "-c", script]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("got:one:"), "{ended:?}");
}

#[test]
fn the_key_that_interrupts_reaches_the_command() {
    let daemon = Daemon::start();
    let script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done";
    let command = ["leasectl", "run", "a/key", "--", "sh", "-c", script];
    let ended = at_terminal(&daemon, &[("ready", "^C")], &command);
    assert_eq!(ended.code, Some(5), "{ended:?}");
    assert_eq!(ended.stdout.matches("caught").count(), 1, "{ended:?}");
}

/// The key ends the command, and so the script around leasectl, though the terminal did not send it to that.
#[test]
fn the_key_that_ends_the_command_ends_the_script_around_it() {
    let daemon = Daemon::start();
    let script = "leasectl run a/key -- sh -c 'echo ready; exec sleep 600'; echo ne''xt";
    for shell in ["sh", "bash"] {
        let ended = at_terminal(&daemon, &[("ready", "^C")], &[shell, "-c", script]);
        assert_eq!(ended.code, Some(130), "{ended:?}");
        assert!(!ended.stdout.contains("next"), "{ended:?}");
        assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "given back");
    }
}

/// The key comes to leasectl, which passes it on.
#[rstest]
fn the_key_ends_the_script_also_where_the_command_has_no_terminal(
    #[values("> /dev/null", "< /dev/null", "| cat")] redirected: &str,
) {
    let daemon = Daemon::start();
    let run = "leasectl run a/key -- sh -c 'echo ready > /dev/tty; exec sleep 600'";
    let script = format!("for round in 1 2; do {run} {redirected}; echo ne''xt; done");
    let ended = at_terminal(&daemon, &[("ready", "^C")], &["bash", "-c", &script]);
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(!ended.stdout.contains("next"), "{ended:?}");
    assert_eq!(daemon.json(&["get", "a/key"])["state"], "free", "given back");
}

#[test]
fn the_key_that_ends_the_wait_ends_the_script_around_it() {
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

/// It is in a process group of its own when it stops.
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

/// As without leasectl: the system ignores the key for a process group that no shell could continue.
#[rstest]
fn the_key_that_stops_does_nothing_under_a_shell_without_job_control(
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

/// timeout(1) makes a background group, and ignores the signals by which that is stopped when it reads the terminal.
#[test]
fn a_program_around_leasectl_that_is_not_to_be_stopped_goes_on() {
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

/// Only the key is meant for the script as well.
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

/// There the terminal could not be taken back, so it is not given away.
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
fn a_command_that_is_stopped_for_too_long_is_lost() {
    let daemon = Daemon::start();
    // It starts nothing: a shell that is stopped while it does may never be seen as stopped (vfork).
    let run = "leasectl run a/key --ttl 4s -- sh -c 'echo re''ady; read x'\n";
    let next = "leasectl run a/key -- echo ne''xt\n";
    let script = [
        ("[#$] ", run),
        ("ready", "^Z"),
        // Waits for the lease to run out; nobody keeps it.
        ("Stopped", next),
        ("next", "fg\n"),
        ("leasectl: ", "echo code $?\n"),
        ("code 73", "exit 0\n"),
    ];
    let ended = at_terminal(&daemon, &script, &["bash", "--norc", "--noprofile", "-i"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn a_wait_is_shown_with_the_holder_the_place_and_the_time() {
    let daemon = Daemon::start();
    daemon.json(&["acquire", "a/key", "--owner=the-holder"]);
    let command = ["leasectl", "run", "a/key", "--", "true"];
    let shown = "a/key: held by the-holder, place 1 of 1 in line; giving up in 59m";
    let ended = at_terminal(&daemon, &[(shown, "^C")], &command);
    assert_eq!(ended.code, Some(130), "{ended:?}");
}

#[test]
fn a_wait_without_end_has_no_time_at_which_it_gives_up() {
    let daemon = Daemon::start();
    let held = daemon.json(&["acquire", "a/key", "--owner=the-holder"]);
    let release = format!("!leasectl release a/key {}", held["lease_id"].as_str().unwrap());
    let command = ["leasectl", "run", "a/key", "--wait", "forever", "--", "echo", "runs"];
    let shown = "held by the-holder, place 1 of 1 in line";
    let ended = at_terminal(&daemon, &[(shown, release.as_str())], &command);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.stdout.contains("giving up") && ended.stdout.contains("runs"), "{ended:?}");
}

/// The line about the wait is erased when the wait is over, also when what it says is longer than the terminal is wide.
#[test]
fn a_wait_leaves_nothing_on_the_screen() {
    let daemon = Daemon::start();
    let key = "k".repeat(300);
    let held = daemon.json(&["acquire", &key, "--owner=the-holder"]);
    let release = format!("!leasectl release {key} {}", held["lease_id"].as_str().unwrap());
    let command = ["leasectl", "run", &key, "--", "echo", "runs"];
    let ended = at_terminal(&daemon, &[("waiting for kkk", release.as_str())], &command);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(!ended.stdout.contains("\x1b[1A"), "it has wrapped: {ended:?}");
    let after = ended.stdout.rsplit("\x1b[2K").next().unwrap();
    assert_eq!(after.trim(), "runs", "{ended:?}");
}
