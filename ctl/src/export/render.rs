//! Exports as people read them.

use std::time::Duration;

use proto::export::{Commands, Info, State, Stats};

use crate::amount;
use crate::render::{Align, stages, table};
use crate::report::printable;

fn state(state: State) -> &'static str {
    match state {
        State::Opening => "opening",
        State::Serving => "serving",
        State::Draining => "draining",
        State::Stopped => "stopped",
    }
}

/// Bytes that these commands moved.
fn bytes(info: &Info, command: &str) -> u64 {
    info.commands.iter().filter(|one| one.command == command).map(|one| one.bytes).sum()
}

fn requests(info: &Info) -> u64 {
    info.commands.iter().map(|one| one.count).sum()
}

/// The empty name is the default export's.
fn name(info: &Info) -> String {
    if info.name.is_empty() { "-".to_owned() } else { printable(&info.name) }
}

/// `export list`
pub fn exports(exports: &[Info], colour: bool) -> String {
    let heads = [
        ("ID", Align::Right),
        ("STATE", Align::Left),
        ("MODE", Align::Left),
        ("SIZE", Align::Right),
        ("CLIENTS", Align::Right),
        ("READ", Align::Right),
        ("WRITTEN", Align::Right),
        ("NAME", Align::Left),
        ("ADDRESS", Align::Left),
        ("VOLUME", Align::Left),
    ];
    let rows: Vec<_> = exports
        .iter()
        .map(|info| {
            vec![
                info.export.to_string(),
                if info.failure.is_some() { "failed".to_owned() } else { state(info.state).to_owned() },
                if info.read_only { "ro" } else { "rw" }.to_owned(),
                if info.bytes > 0 { amount::bytes(info.bytes) } else { "-".to_owned() },
                info.connections.to_string(),
                amount::bytes(bytes(info, "read")),
                amount::bytes(bytes(info, "write")),
                name(info),
                printable(&info.address),
                printable(&info.volume),
            ]
        })
        .collect();
    table(&heads, &rows, colour)
}

/// `2 clients, 1.20 GiB read at 950.00 MiB/s, 0 B written at 0 B/s`
pub fn live(info: &Info, before: Option<(Duration, &Info)>) -> String {
    let clients = match info.connections {
        1 => "1 client".to_owned(),
        count => format!("{count} clients"),
    };
    let moved = |command: &str, done: &str| {
        let now = bytes(info, command);
        let rate = before.map(|(time, before)| {
            let new = now.saturating_sub(bytes(before, command));
            amount::real(new) / time.as_secs_f64().max(0.001)
        });
        let rate = rate.map(|rate| format!(" at {}", amount::rate(rate))).unwrap_or_default();
        format!("{} {done}{rate}", amount::bytes(now))
    };
    let errors = if info.errors > 0 { format!(", {} errors", info.errors) } else { String::new() };
    format!("{clients}, {}, {}{errors}", moved("read", "read"), moved("write", "written"))
}

/// One line at the end.
pub fn ended(info: &Info) -> String {
    let mut text = format!(
        "export {} of {} {}: {} connection{}, {} requests, {} read, {} written",
        info.export,
        printable(&info.volume),
        if info.failure.is_some() { "failed" } else { state(info.state) },
        info.connections_total,
        if info.connections_total == 1 { "" } else { "s" },
        requests(info),
        amount::bytes(bytes(info, "read")),
        amount::bytes(bytes(info, "write")),
    );
    if info.errors > 0 {
        text.push_str(&format!(", {} ended in errors", info.errors));
    }
    text.push_str(&format!(", in {}", amount::seconds(info.seconds)));
    text
}

/// `export stats`
pub fn stats(stats: &Stats, colour: bool) -> String {
    let info = &stats.info;
    let mut text = format!(
        "export {} of {}: {}, {} of {} connections, {} errors, {} system calls{}\n",
        info.export,
        printable(&info.volume),
        state(info.state),
        info.connections,
        info.connections_total,
        info.errors,
        stats.syscalls,
        stats.bottleneck.map(|stage| format!(", bottleneck {}", stage.name())).unwrap_or_default()
    );
    if !info.commands.is_empty() {
        let heads = [
            ("COMMAND", Align::Left),
            ("COUNT", Align::Right),
            ("BYTES", Align::Right),
            ("MEAN", Align::Right),
        ];
        let rows: Vec<_> = info.commands.iter().map(command).collect();
        text.push_str(&table(&heads, &rows, colour));
    }
    if !stats.stages.is_empty() {
        text.push('\n');
        text.push_str(&stages(&stats.stages, colour));
    }
    text
}

fn command(one: &Commands) -> Vec<String> {
    let mean = one.bytes.checked_div(one.count).filter(|mean| *mean > 0);
    vec![
        one.command.clone(),
        one.count.to_string(),
        amount::bytes(one.bytes),
        mean.map_or_else(|| "-".to_owned(), amount::bytes),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> Info {
        let text = r#"{"export":3,"uid":0,"state":"serving","volume":"a\u001bb","address":"unix:/s","name":"","bytes":1048576,
            "read_only":true,"connections":2,"connections_total":5,"seconds":2.0,"errors":1,"commands":[
            {"command":"read","count":3,"bytes":12288},{"command":"flush","count":1,"bytes":0}]}"#;
        serde_json::from_str(text).expect("parses")
    }

    #[test]
    fn a_list_is_a_table() {
        assert_eq!(
            exports(&[info()], false),
            "ID  STATE    MODE      SIZE  CLIENTS       READ  WRITTEN  NAME  ADDRESS  VOLUME\n \
             3  serving  ro    1.00 MiB        2  12.00 KiB      0 B  -     unix:/s  a\u{fffd}b\n"
        );
    }

    #[test]
    fn the_live_line_tells_rates_since_the_last() {
        assert_eq!(live(&info(), None), "2 clients, 12.00 KiB read, 0 B written, 1 errors");
        let mut before = info();
        before.commands[0].bytes = 8192;
        let line = live(&info(), Some((Duration::from_secs(2), &before)));
        assert_eq!(line, "2 clients, 12.00 KiB read at 2.00 KiB/s, 0 B written at 0 B/s, 1 errors");
    }

    #[test]
    fn the_end_is_one_line() {
        let over = Info { state: State::Stopped, ..info() };
        assert_eq!(
            ended(&over),
            "export 3 of a\u{fffd}b stopped: 5 connections, 4 requests, 12.00 KiB read, 0 B written, 1 ended in errors, in 2.0 s"
        );
    }

    #[test]
    fn statistics_tell_commands_and_stages() {
        let text = stats(&Stats { info: info(), stages: Vec::new(), bottleneck: None, syscalls: 7 }, false);
        assert_eq!(
            text,
            "export 3 of a\u{fffd}b: serving, 2 of 5 connections, 1 errors, 7 system calls\n\
             COMMAND  COUNT      BYTES      MEAN\n\
             read         3  12.00 KiB  4.00 KiB\n\
             flush        1        0 B         -\n"
        );
    }
}
