//! `completions`: what makes a shell complete commands, options and the names of nodes.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::{Cli, Failure, Options, Outcome, print};

/// Print a script that completes commands and options in a shell, and in bash, zsh and fish nodes.
#[derive(Args)]
#[command(after_help = "Examples:
  source <(kv54 completions bash)
  kv54 completions fish > ~/.config/fish/completions/kv54.fish")]
pub(super) struct Completions {
    /// The shell
    #[arg(required_unless_present = "nodes")]
    shell: Option<Shell>,
    /// Print the names of the file's nodes instead, one a line: the scripts call this
    #[arg(long, conflicts_with = "shell")]
    nodes: bool,
}

/// How a script asks for the names when they are wanted: it cannot know them.
const NODES: &str = "(kv54 completions --nodes 2> /dev/null)";
/// For bash, where clap's script has no way to complete the value of an argument.
const BASH: &str = r#"_kv54_or_node() {
    _kv54 "$@"
    if [[ $3 == --via || $3 == serve && $2 != -* ]]; then
        COMPREPLY=( $(compgen -W "$NODES" -- "$2") )
    fi
}
"#;
/// For fish, where clap's script completes options alone.
const FISH: &str = "complete -c kv54 -n '__fish_kv54_using_subcommand serve' -f -a '$NODES'\n";

impl Completions {
    pub(super) fn run(self, options: &Options) -> Outcome {
        let Some(shell) = self.shell else {
            return print(options.cluster()?.names().join("\n") + "\n");
        };
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "kv54", &mut script);
        let script = String::from_utf8(script).map_err(Failure::usage)?;
        // What takes a node's name is marked as a host's, and clap's scripts ask the system for those.
        print(match shell {
            Shell::Bash => {
                let script = script.replace("complete -F _kv54 ", "complete -F _kv54_or_node ");
                BASH.replace("NODES", NODES) + &script
            }
            Shell::Fish => {
                script.replace("(__fish_print_hostnames)", NODES) + &FISH.replace("$NODES", NODES)
            }
            Shell::Zsh => script
                .replace(":_hosts'", &format!(":(${NODES})'"))
                .replace("'*::keys", "'*:keys"), // else no option is completed behind a key
            _ => script,
        })
    }
}
