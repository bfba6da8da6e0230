//! `cryptctl export …`: serve a volume, and see to those that are served.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the conversation: begin, stay in the foreground, end on a signal |
//! | `args` | what was typed |
//! | `request` | what was typed means: volume, key, access, the request |
//! | `listen` | listening sockets, bound with the caller's rights; what clients connect to |
//! | `render` | exports as people read them |
//! | `help` | the long help |
//!
//! In the foreground the export ends with this program, however that ends: the daemon stops it when the connection is gone.

pub mod args;
pub mod help;
pub mod listen;
mod render;
mod request;

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use proto::export::{ExportId, Info, State};
use proto::{Call, ErrorKind, Reply};

use crate::args::Global;
use crate::client::{Client, out_of_turn};
use crate::launch;
use crate::progress::note;
use crate::render::Output;
use crate::report::{Error, Exit, Result};
use crate::signals::Signals;

use args::{About, Export, Serve};
use request::Prepared;

/// How often the foreground looks at its export: for its line on a terminal, elsewhere only whether it has ended.
const LOOK_LIVE: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_secs(1);

/// `cryptctl export …`
pub fn run(export: &Export, global: &Global) -> Result<Exit> {
    let Some(verb) = &export.verb else { return serve(&export.serve, global) };
    let mut client = launch::reach(global)?;
    let mut output = Output::new(false);
    let colour = output.colour();
    let (call, stopped) = match verb {
        About::List => (Call::Exports {}, false),
        About::Stop { export, now } => (Call::ExportStop { export: export.export, now: *now }, true),
        About::Stats(export) => (Call::ExportStats { export: export.export }, false),
    };
    let (reply, text) = if stopped {
        // Clients may take as long as the daemon lets them.
        ask(&mut client, &mut Signals::catch()?, call, &[])?
    } else {
        client.call(call, &[])?
    };
    if global.json {
        output.line(&text);
    }
    match (reply, stopped) {
        (Reply::Exports(exports), true) => {
            let info = exports.into_iter().next().ok_or_else(out_of_turn)?;
            if !global.json && !global.quiet {
                note(&render::ended(&info));
            }
            verdict(info)?;
        }
        (Reply::Exports(exports), false) if !global.json => output.text(&render::exports(&exports, colour)),
        (Reply::ExportStats(stats), false) if !global.json => output.text(&render::stats(&stats, colour)),
        (Reply::Exports(_) | Reply::ExportStats(_), false) => {}
        _ => return Err(out_of_turn()),
    }
    output.end().map(|()| Exit::Done)
}

/// How an export ended, as our own end.
fn verdict(info: Info) -> Result<()> {
    info.failure.map_or(Ok(()), |failure| Err(failure.into()))
}

fn serve(args: &Serve, global: &Global) -> Result<Exit> {
    let opened = request::open(args)?;
    let mut client = launch::reach_or_start(global)?;
    opened.warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
    let doubt = opened.doubt.clone();
    let (exports, _) = list(&mut client)?;
    // From here on there is something to undo, so a signal must not just end us.
    let mut signals = Signals::catch()?;
    let Prepared { request, descriptors, name, uri } = opened.create(&exports)?;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let answer = ask(&mut client, &mut signals, Call::Export(Box::new(request)), &borrowed);
    drop(borrowed);
    // The daemon has its own copies. Ours would keep the socket open when the daemon's is closed.
    drop(descriptors);
    let (reply, text) = answer.map_err(|error| error.doubted(doubt))?;
    let Reply::Exported { export, warnings } = reply else { return Err(out_of_turn()) };
    warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
    let mut output = Output::new(false);
    if global.json {
        output.line(&text);
    } else if args.detach {
        output.line(&export.to_string());
        if !global.quiet {
            note(&format!("clients connect to {uri}"));
        }
    } else {
        output.line(&uri);
    }
    if args.detach {
        name.into_iter().for_each(listen::Name::keep);
        return output.end().map(|()| Exit::Done);
    }
    let mut foreground = Foreground {
        export,
        signals,
        signalled: 0,
        live: std::io::stderr().is_terminal() && !global.quiet && !global.json,
        drawn: 0,
        last: None,
    };
    let ended = foreground.stay(client, global);
    foreground.wipe();
    if ended.is_ok() {
        // The daemon has removed it, or another export listens there.
        name.into_iter().for_each(listen::Name::keep);
    }
    let (info, text) = ended?;
    if global.json {
        output.line(&text);
    } else if !global.quiet {
        note(&render::ended(&info));
    }
    verdict(info)?;
    output.end().map(|()| Exit::Done)
}

fn list(client: &mut Client) -> Result<(Vec<Info>, String)> {
    match client.call(Call::Exports {}, &[])? {
        (Reply::Exports(exports), text) => Ok((exports, text)),
        _ => Err(out_of_turn()),
    }
}

/// Ask and wait for the answer, however long that takes. A signal hangs up: what is being opened is given up then, and what is being
/// stopped stops all the same.
fn ask(
    client: &mut Client,
    signals: &mut Signals,
    call: Call,
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> Result<(Reply, String)> {
    let stops = matches!(call, Call::ExportStop { .. });
    let id = client.send(call, descriptors)?;
    loop {
        if let Some(answer) = client.answer(id)? {
            return answer;
        }
        let woken = client.wait(Some(signals.as_fd()), None)?;
        if woken.readable {
            client.fill()?;
        } else if woken.other && signals.take() > 0 {
            client.hang_up();
            let what = if stops {
                "interrupted: the export goes on ending"
            } else {
                "interrupted while the volume was opened: nothing is served"
            };
            return Err(Error::new(ErrorKind::Cancelled, what));
        }
    }
}

/// An export that ends with us.
struct Foreground {
    export: ExportId,
    signals: Signals,
    signalled: usize,
    /// Somebody looks on.
    live: bool,
    /// Characters of the line that is drawn.
    drawn: usize,
    last: Option<(Instant, Info)>,
}

impl Foreground {
    /// Until it has ended, by a signal or by itself. Returns how it stood then, and the daemon's words for that.
    fn stay(&mut self, mut client: Client, global: &Global) -> Result<(Info, String)> {
        let look = if self.live { LOOK_LIVE } else { LOOK };
        let mut stop = None;
        loop {
            if let Some(id) = stop {
                if let Some(answer) = client.answer(id)? {
                    return match answer {
                        Ok((Reply::Exports(exports), text)) => match exports.into_iter().next() {
                            Some(info) => Ok((info, text)),
                            None => Err(out_of_turn()),
                        },
                        Ok(_) => Err(out_of_turn()),
                        // It has ended by itself meanwhile.
                        Err(error) if error.failure.kind == ErrorKind::Conflict => {
                            stop = None;
                            continue;
                        }
                        Err(error) => Err(error),
                    };
                }
            } else {
                let (exports, text) = list(&mut client)?;
                match exports.into_iter().find(|info| info.export == self.export) {
                    Some(info) if info.state == State::Stopped => return Ok((info, text)),
                    Some(info) => self.show(info),
                    None => {
                        let what = format!("export {} has ended, and is no longer remembered", self.export);
                        return Err(Error::new(ErrorKind::NotFound, what));
                    }
                }
            }
            let timeout = if stop.is_none() { Some(look) } else { None };
            let woken = client.wait(Some(self.signals.as_fd()), timeout)?;
            if woken.readable {
                client.fill()?;
            }
            if woken.other {
                self.signalled += self.signals.take();
                match self.signalled {
                    0 => {}
                    1 => {
                        self.wipe();
                        if !global.quiet {
                            note("draining; interrupt again to drop clients");
                        }
                        stop = Some(client.send(Call::ExportStop { export: self.export, now: false }, &[])?);
                    }
                    2 => {
                        if stop.is_none() {
                            stop =
                                Some(client.send(Call::ExportStop { export: self.export, now: true }, &[])?);
                        } else {
                            // The daemon takes nothing more on this connection before its answer.
                            launch::reach(global)?
                                .send(Call::ExportStop { export: self.export, now: true }, &[])?;
                        }
                        if !global.quiet {
                            note("dropping clients; interrupt again to leave at once");
                        }
                    }
                    _ => {
                        return Err(Error {
                            exit: Exit::Interrupted,
                            ..Error::new(ErrorKind::Cancelled, "left at once: the export goes on ending")
                        });
                    }
                }
            }
        }
    }

    /// The line of what goes on, in place of the one before.
    fn show(&mut self, info: Info) {
        let now = Instant::now();
        if self.live {
            let before = self.last.as_ref().map(|(at, before)| (now.duration_since(*at), before));
            let line = render::live(&info, before);
            let width = line.chars().count();
            let gap = " ".repeat(self.drawn.saturating_sub(width));
            // Nobody looks on any more, if that fails.
            let _ = write!(std::io::stderr(), "\r{line}{gap}");
            self.drawn = width;
        }
        self.last = Some((now, info));
    }

    fn wipe(&mut self) {
        if self.drawn > 0 {
            let _ = write!(std::io::stderr(), "\r{}\r", " ".repeat(self.drawn));
            self.drawn = 0;
        }
    }
}
