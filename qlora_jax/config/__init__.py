"""Configuration of a run: its settings, YAML files, command lines, and errors."""

from qlora_jax.config.command_line import Command as Command
from qlora_jax.config.command_line import read_arguments as read_arguments
from qlora_jax.config.command_line import run_main as run_main
from qlora_jax.config.lora_settings import LoraArgs as LoraArgs
from qlora_jax.config.mesh_settings import HostsArgs as HostsArgs
from qlora_jax.config.mesh_settings import MeshArgs as MeshArgs
from qlora_jax.config.mesh_settings import MeshSize as MeshSize
from qlora_jax.config.optimizer_names import paging_of as paging_of
from qlora_jax.config.optimizer_names import plain_name as plain_name
from qlora_jax.config.parse import ConfigError as ConfigError
from qlora_jax.config.question_settings import QUESTION_KINDS as QUESTION_KINDS
from qlora_jax.config.question_settings import QuestionArgs as QuestionArgs
from qlora_jax.config.question_settings import question_problems as question_problems
from qlora_jax.config.schema import ROW_COLUMNS as ROW_COLUMNS
from qlora_jax.config.schema import Config as Config
from qlora_jax.config.schema import DataArgs as DataArgs
from qlora_jax.config.schema import ModelArgs as ModelArgs
from qlora_jax.config.schema import OptimArgs as OptimArgs
from qlora_jax.config.schema import TrainArgs as TrainArgs
from qlora_jax.config.validate import validate as validate
from qlora_jax.config.validate_mesh import mesh_choices as mesh_choices
from qlora_jax.config.yaml_files import differences as differences
from qlora_jax.config.yaml_files import read_config as read_config
from qlora_jax.config.yaml_files import to_dict as to_dict
from qlora_jax.config.yaml_files import write_config as write_config
